"""Pre-trained vision transformers as a start: timm and DeiT checkpoints, Google's .npz files, and our own folders."""

import re
from collections.abc import Mapping
from math import isqrt, prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gridattn.models.state import CheckpointError, load_checkpoint, load_strict
from gridattn.systems.dcal.backbone import ViT, position_table
from gridattn.systems.dcal.model import DCAL
from gridattn.systems.output import RunFolder

IGNORED = ("head.", "head_dist.", "pre_logits.", "dist_token")
"""Names of a classifier that is not taken over; the distillation token of DeiT goes with its position."""

_HEADS = ("head.", "glca_head.", "bnneck.", "glca_bnneck.")
_BLOCK = r"^Transformer/encoderblock_(\d+)/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_UNIT = r"^block(\d+)/unit(\d+)/"
_NORMS = {"scale": "weight", "bias": "bias"}
_LINEAR = {"kernel": "weight", "bias": "bias"}


def start_from(model: DCAL, path: str | PathLike[str]) -> None:
    """Loads pre-trained weights into `model`.

    A plain vision transformer fills `backbone.`, its last blocks and norm also the global-local branch. Position
    embeddings are interpolated bicubically to the model's grid. A network of ours also gives the branch and, for as
    many classes, the heads.

    Args:
        model: the network.
        path: a checkpoint with timm's or DeiT's names (safetensors, or a pickled one of tensors alone), a Google .npz,
            or the folder of a trained DCAL.

    Raises:
        CheckpointError: a file that cannot be read, could run code, or holds another network.
    """
    file = Path(path)
    if file.is_dir():
        inner = RunFolder(file).model
        file = (inner if inner.is_dir() else file) / "model.safetensors"
    try:
        if file.suffix == ".npz":
            state = google_state(_read_npz(file))
        else:
            state = load_checkpoint(file)
        if any(name.startswith("backbone.") for name in state) and "cls_token" not in state:
            _load_own(model, state)
        else:
            load_strict(model.backbone, backbone_state(state, model.backbone))
            model.start_local()
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(file) in text else f"weights={str(path)!r}: {text}") from None


def backbone_state(state: Mapping[str, Tensor], vit: ViT) -> dict[str, Tensor]:
    """The state of a timm or DeiT vision transformer for our backbone: classifier left out, positions interpolated.

    The position embedding of a file is taken to be of a square grid unless it has the length of ours.

    Args:
        state: timm's names; `dist_token` marks a distilled DeiT, with a position of its own.
        vit: the backbone.

    Raises:
        CheckpointError: position embeddings of no square grid.

    Example:
        >>> from gridattn.systems.dcal.model import build_dcal
        >>> small, large = (build_dcal("micro", num_classes=2, img_size=s) for s in (32, (24, 40)))
        >>> backbone_state(small.backbone.state_dict(), large.backbone)["pos_embed"].shape
        torch.Size([1, 61, 48])
    """
    ours = {name: tensor for name, tensor in state.items() if not name.startswith(IGNORED)}
    table = ours.get("pos_embed")
    if table is None or table.ndim != 3:
        return ours
    if "dist_token" in state:
        table = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    ours["pos_embed"] = _fit(table, vit)
    return ours


def google_state(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The arrays of a Google ViT or R50-ViT file under timm's names; the classifier is left out.

    Raises:
        CheckpointError: a name without counterpart, or a block without its query, key and value.

    Example:
        >>> state = google_state({"cls": np.zeros((1, 1, 8)), "embedding/kernel": np.zeros((4, 4, 3, 8))})
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'cls_token': (1, 1, 8), 'patch_embed.proj.weight': (8, 3, 4, 4)}
    """
    state: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for full, array in arrays.items():
        name = full.removeprefix("opt/target/")
        if name.startswith(("head/", "pre_logits/")):
            continue
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        if found := re.match(_ATTENTION + r"(query|key|value)/(kernel|bias)$", name):
            block, part, kind = found.groups()
            flat = tensor.flatten(1).T if kind == "kernel" else tensor.flatten()
            packed.setdefault(f"blocks.{block}.attn.qkv.{_LINEAR[kind]}", {})[part] = flat
        else:
            key, value = _counterpart(name, tensor)
            state[key] = value.contiguous()
    for name, parts in packed.items():
        if len(parts) < 3:
            raise CheckpointError(f"{name!r} lacks one of query, key and value")
        state[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    return state


def _counterpart(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """timm's name and layout of one array that is no query, key or value."""
    if name == "cls":
        return "cls_token", tensor
    if name == "Transformer/posembed_input/pos_embedding":
        return "pos_embed", tensor
    if found := re.match(r"^embedding/(kernel|bias)$", name):
        return f"patch_embed.proj.{_LINEAR[found[1]]}", _convolution(tensor)
    if found := re.match(r"^Transformer/encoder_norm/(scale|bias)$", name):
        return f"norm.{_NORMS[found[1]]}", tensor
    if found := re.match(_BLOCK + r"LayerNorm_([02])/(scale|bias)$", name):
        return f"blocks.{found[1]}.norm{1 if found[2] == '0' else 2}.{_NORMS[found[3]]}", tensor
    if found := re.match(_ATTENTION + r"out/(kernel|bias)$", name):
        value = tensor.flatten(0, 1).T if found[2] == "kernel" else tensor
        return f"blocks.{found[1]}.attn.proj.{_LINEAR[found[2]]}", value
    if found := re.match(_BLOCK + r"MlpBlock_3/Dense_([01])/(kernel|bias)$", name):
        value = tensor.T if found[3] == "kernel" else tensor
        return f"blocks.{found[1]}.mlp.fc{int(found[2]) + 1}.{_LINEAR[found[3]]}", value
    if name == "conv_root/kernel":
        return "patch_embed.backbone.stem.conv.weight", _convolution(tensor)
    if found := re.match(r"^gn_root/(scale|bias)$", name):
        return f"patch_embed.backbone.stem.norm.{_NORMS[found[1]]}", tensor.flatten()
    if found := re.match(_UNIT + r"(conv|gn)(\d|_proj)/(kernel|scale|bias)$", name):
        stage, unit, kind, number, entry = found.groups()
        layer = {"conv": "conv", "gn": "norm"}[kind]
        place = f"downsample.{layer}" if number == "_proj" else f"{layer}{number}"
        key = f"patch_embed.backbone.stages.{int(stage) - 1}.blocks.{int(unit) - 1}.{place}"
        if kind == "conv":
            return f"{key}.weight", _convolution(tensor)
        return f"{key}.{_NORMS[entry]}", tensor.flatten()
    raise CheckpointError(f"{name!r} has no counterpart in a vision transformer")


def _convolution(tensor: Tensor) -> Tensor:
    """(height, width, in, out) -> (out, in, height, width); a bias stays."""
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor


def _read_npz(file: Path) -> dict[str, NDArray[Any]]:
    if not file.is_file():
        raise CheckpointError(f"weights {str(file)!r} is missing; a file is needed")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile report a damaged file by errors of many kinds
        raise CheckpointError(f"weights {str(file)!r} cannot be read: {str(error).splitlines()[0]}") from None


def _fit(table: Tensor, vit: ViT) -> Tensor:
    count = table.shape[1] - 1
    side = isqrt(max(count, 0))
    grid = vit.grid if count == prod(vit.grid) else (side, side)
    if count != prod(grid) or count < 1:
        raise CheckpointError(f"pos_embed of length {table.shape[1]} is of no square grid and class token")
    return position_table(table, grid, vit.grid)


def _load_own(model: DCAL, state: Mapping[str, Tensor]) -> None:
    """Takes over what a network of ours has, but heads of another number of classes."""
    own = model.state_dict()
    kept = dict(state)
    for prefix in _HEADS:
        names = {name for name in (*own, *kept) if name.startswith(prefix)}
        if any(name not in kept or name not in own or kept[name].shape != own[name].shape for name in names):
            kept = {name: t for name, t in kept.items() if name not in names}
            kept |= {name: own[name] for name in names if name in own}
    if "backbone.pos_embed" in kept:
        kept["backbone.pos_embed"] = _fit(kept["backbone.pos_embed"], model.backbone)
    branch = [name for name in own if name.startswith(("glca.", "glca_norm."))]
    fresh = [name for name in branch if name not in kept]
    kept = {name: t for name, t in kept.items() if name in own or not name.startswith(("glca.", "glca_norm."))}
    load_strict(model, kept | {name: own[name] for name in fresh})
    if fresh:
        model.start_local()
