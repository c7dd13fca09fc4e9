"""Weights to start a segmentation network from: of a backbone, of a published segmentation network, of a run."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from gridattn.models.state import CheckpointError, load_checkpoint, load_strict, load_weights
from gridattn.systems.output import RunFolder
from gridattn.systems.segment.model import Segmenter

RENAMED = (
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"head.pooled.\1."),
    (r"^decode_head\.bottleneck\.", "head.top."),
    (r"^decode_head\.lateral_convs\.(\d+)\.", r"head.laterals.\1."),
    (r"^decode_head\.fpn_convs\.(\d+)\.", r"head.smooths.\1."),
    (r"^decode_head\.fpn_bottleneck\.", "head.join."),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"head.neck.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.", r"head.neck.layer_blocks.\1.0."),
    (r"^auxiliary_head\.convs\.0\.", "aux_head.conv."),
    (r"^(decode|auxiliary)_head\.conv_seg\.", lambda m: f"{'aux_head' if m[1][0] == 'a' else 'head'}.classifier.1."),
    (r"\.conv\.weight$", ".0.weight"),
    (r"\.bn\.(\w+)$", r".1.\1"),
)
"""Published name -> ours, for heads; the patterns apply one after the other."""

_SCALE_HEAD = re.compile(r"^decode_head\.scale_heads\.(\d+)\.(\d+)\.")


def convert_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads of a network published in mmsegmentation's layout (`decode_head`, `neck`, `auxiliary_head`), our names.

    Example:
        >>> import torch
        >>> list(convert_heads({"decode_head.fpn_convs.0.bn.weight": torch.ones(4)}))
        ['head.smooths.0.1.weight']
    """
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    scale = _SCALE_HEAD.match(name)
    if scale:  # units and doublings alternate in all branches but the first
        name = f"head.branches.{scale[1]}.{int(scale[2]) // 2}.{name[scale.end() :]}"
    elif name.startswith("auxiliary_head.convs.0.conv."):
        return "aux_head.conv.0.weight"
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def load_published(network: Segmenter, state: Mapping[str, Tensor]) -> None:
    """Loads a network published in mmsegmentation's layout, strictly; classifiers for other classes stay as they are.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    groups: dict[str, dict[str, Tensor]] = {"backbone": {}, "rest": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        groups["backbone" if part == "backbone" else "rest"][rest if part == "backbone" else name] = tensor
    heads = convert_heads(groups["rest"])
    if network.aux_head is None:
        heads = {name: tensor for name, tensor in heads.items() if not name.startswith("aux_head.")}
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("backbone.")}
    _load_parts(network, _keep_other_classifiers(heads, own))
    network.backbone.load_official(groups["backbone"])


def _load_parts(network: Segmenter, heads: Mapping[str, Tensor]) -> None:
    parts = nn.ModuleDict({"head": network.head})
    if network.aux_head is not None:
        parts["aux_head"] = network.aux_head
    load_strict(parts, heads)


def _keep_other_classifiers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state, with our own classifiers where the stored ones have another number of classes."""
    kept = dict(state)
    for name, tensor in own.items():
        if ".classifier." in name and name in kept and kept[name].shape != tensor.shape:
            kept[name] = tensor
    return kept


def start_from(network: Segmenter, weights: str | Path) -> None:
    """Loads weights to start a training from.

    Args:
        network: takes the weights; classifiers for another number of classes keep their initial ones.
        weights: a file of a backbone or classifier (ours or as published); a file of a segmentation network in
            mmsegmentation's layout; or a run or an exported model of this system or of classify.

    Raises:
        CheckpointError: a file that cannot be read or belongs to another network.
    """
    path = Path(weights)
    if path.is_dir():
        folder = RunFolder(path).model
        path = (folder if folder.is_dir() else path) / "model.safetensors"
    state = load_checkpoint(path)
    try:
        if any(name.startswith("decode_head.") for name in state):
            load_published(network, state)
        elif any(name.startswith("backbone.body.") for name in state):
            own = network.state_dict()
            if network.aux_head is None:
                state = {name: tensor for name, tensor in state.items() if not name.startswith("aux_head.")}
            load_strict(network, _keep_other_classifiers(state, own))
        else:
            load_weights(network.backbone, path)
    except CheckpointError as error:
        raise CheckpointError(f"weights={str(weights)!r}: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"weights={str(weights)!r} do not fit: {error}") from None
