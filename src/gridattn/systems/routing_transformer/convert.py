"""Checkpoints of the PyTorch package `routing-transformer` as folders of trained models."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from gridattn.layers.routing import convert_official
from gridattn.models.state import CheckpointError, load_checkpoint, load_strict
from gridattn.systems.routing_transformer.model import build_model
from gridattn.systems.routing_transformer.text import ByteCodec
from gridattn.systems.settings import check_least
from gridattn.systems.trained import Trained, save_trained

_BRANCH = re.compile(
    r"routing_transformer\.(?:fn\.)?layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.((?:fn\.)*)(.+)"
)
_OUTER = {
    "token_emb.weight": "tokens.weight",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "out.weight": "out.weight",
    "out.bias": "out.bias",
}
_IGNORED = ("sinu_pos_emb.emb", "out.tensor")  # computed, and the token vectors again


def convert_package_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the package's language model -> state of the `TextModel` of the same shape.

    Raises:
        CheckpointError: an entry that has no counterpart here, such as those of product-key memories.
    """
    ours: dict[str, Tensor] = {}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = _BRANCH.fullmatch(name)
        project = re.fullmatch(r"routing_transformer\.(project_(?:in|out)\.(?:weight|bias))", name)
        if found:
            layer, kind = found[1] or found[3], found[2] or found[4]
            block = f"stack.blocks.{layer}."
            part = "attention" if kind in "0f" else "feed"
            rest = found[6]
            if rest == "residual_weight":
                ours[f"{block}{part}_gain"] = tensor.view(())
            elif rest in ("norm.weight", "norm.bias", "norm.g") and not found[5]:
                ours[f"{block}{part}_{rest.replace('norm.g', 'norm.gain')}"] = tensor
            else:
                inner.setdefault(f"{block}{part}.", {})[rest] = tensor
        elif project:
            ours[project[1]] = tensor
        elif name in _OUTER:
            ours[_OUTER[name]] = tensor
        elif name not in _IGNORED:
            raise CheckpointError(f"{name!r} has no counterpart in this library's model")
    for prefix, part in inner.items():
        if prefix.endswith("attention."):
            ours |= {prefix + name: tensor for name, tensor in convert_official(part).items()}
            continue
        for name, tensor in part.items():
            if not re.fullmatch(r"w[12]\.(weight|bias)", name):
                raise CheckpointError(f"{prefix + name!r} has no counterpart in this library's model")
            ours[f"{prefix}fc{name[1:]}"] = tensor
    return ours


def package_network(
    state: Mapping[str, Tensor], window_size: int, local_window: int | None = None, *, is_causal: bool = True
) -> dict[str, Any]:
    """Keywords of `build_model` for a state of the package's language model, from the shapes of its tensors.

    Args:
        state: names and tensors, as the package stores them.
        window_size: positions per cluster.
        local_window: positions per block of the local heads; `window_size` when None, as in the package.
        is_causal: whether the model is.

    Raises:
        CheckpointError: a state that is not one of the package's language model.
    """
    ours = convert_package_state(state)
    reversible = any(".blocks." in name for name in state)
    depth = 1 + max((int(n.split(".")[2]) for n in ours if n.startswith("stack.blocks.")), default=-1)
    if not depth or "tokens.weight" not in ours:
        raise CheckpointError("the state dict is not that of a language model of the package routing-transformer")
    means = [tensor for name, tensor in ours.items() if name.endswith("kmeans.means")]
    frequencies = [tensor for name, tensor in state.items() if name.endswith("local_attn.rel_pos.inv_freq")]
    head_dim = means[0].shape[-1] if means else 2 * len(frequencies[0])
    local = [_rows(ours, i, "local_to_qkv") // (3 * head_dim) for i in range(depth)]
    to_out, width = ours["stack.blocks.0.attention.to_out.weight"], ours["tokens.weight"].shape[1]
    fc1, fc2 = (ours[f"stack.blocks.0.feed.fc{i}.weight"] for i in (1, 2))
    memory = [tensor for name, tensor in ours.items() if name.endswith("mem_key")]
    first = "stack.blocks.0.attention_"
    return {
        "kind": "text",
        "symbols": len(ours["tokens.weight"]),
        "dim": len(to_out),
        "depth": depth,
        "num_heads": to_out.shape[1] // head_dim,
        "head_dim": head_dim,
        "local_heads": local,
        "window_size": window_size if local_window is None else local_window,
        "num_clusters": means[0].shape[1] if means else 1,
        "cluster_size": window_size,
        "embedding": width if width != len(to_out) else None,
        "hidden": fc2.shape[1],
        "gated": len(fc1) == 2 * fc2.shape[1],
        "tied": "out.weight" not in ours,
        "norm": "rezero" if f"{first}gain" in ours else "scale" if f"{first}norm.gain" in ours else "layer",
        "shift": any(re.search(r"(\.0|\.f\.net)\.fn\.fn\.to_out", name) for name in state),
        "reversible": reversible,
        "num_memory": memory[0].shape[2] if memory else 0,
        "is_causal": is_causal,
        "shared_qk": not any(name.endswith(".to_k.weight") for name in ours),
    }


def convert_package_checkpoint(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    window_size: int,
    *,
    local_window: int | None = None,
    data: str = "docstrings",
) -> dict[str, Any]:
    """Writes a checkpoint of the package's causal language model as a folder that `evaluate` and `predict` take.

    Args:
        checkpoint: a safetensors file or a pickled one of tensors alone.
        output: folder to write.
        window_size: the package's `window_size`; it is not in the file.
        local_window: the package's `local_attn_window_size`.
        data: text to measure it on unless told otherwise. A vocabulary of 256 is taken for plain bytes, one of 258 for
            bytes after two reserved symbols.

    Returns:
        Keywords of `build_model`.

    Raises:
        CheckpointError: a file that cannot be read, could run code, or holds another model.
    """
    check_least("window_size", window_size, 1)
    state = load_checkpoint(checkpoint)
    network = package_network(state, window_size, local_window)
    model = build_model(**network)
    try:
        load_strict(model, convert_package_state(state))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {str(checkpoint)!r}: {error}") from None
    length = network["num_clusters"] * window_size
    codec = ByteCodec(network["symbols"] - 256) if network["symbols"] in (256, 258) else None
    about = {"data": data, "length": length, "codec": None if codec is None else codec.stored()}
    save_trained(Trained("routing-transformer", model, network, about), Path(output))
    return network


def _rows(state: Mapping[str, Tensor], layer: int, name: str) -> int:
    tensor = state.get(f"stack.blocks.{layer}.attention.{name}.weight")
    return 0 if tensor is None else len(tensor)
