"""What the operator refuses, with messages that name the argument, its value and what is allowed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gridattn.ops.common import check_same_kind
from gridattn.ops.neighborhood.plan import Plan


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks ranks, shapes, dtypes and devices of query, key and value against each other."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested or tensor.layout != torch.strided:
            raise NotImplementedError(f"{name} is a nested or sparse tensor; dense tensors are allowed")
        if tensor.ndim not in (4, 5, 6):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; (batch, 1 to 3 grid axes, heads, head_dim) is allowed"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; a floating point dtype is allowed")
    check_same_kind(query=query, key=key, value=value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} has batch and grid {tuple(tensor.shape[:-2])} but query has {tuple(query.shape[:-2])}; "
                "they must be equal"
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]} but query has {query.shape[-1]}; they must be equal")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value has {value.shape[-2]} heads but key has {key.shape[-2]}; they must be equal")
    if 0 in (query.shape[-2], key.shape[-2], query.shape[-1]):
        raise ValueError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}; at least one head and channel each"
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads; a multiple of the {key.shape[-2]} heads of key is allowed"
        )


def check_additional(
    key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> None:
    """Checks the additional tokens against key and value."""
    if additional_keys is None and additional_values is None:
        return
    if additional_keys is None or additional_values is None:
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{missing} is None; additional_keys and additional_values are given together or not at all")
    check_same_kind(key=key, additional_keys=additional_keys, additional_values=additional_values)
    length = additional_keys.shape[1] if additional_keys.ndim == 4 else "N"
    for name, tensor, like in (
        ("additional_keys", additional_keys, key),
        ("additional_values", additional_values, value),
    ):
        allowed = (like.shape[0], length, like.shape[-2], like.shape[-1])
        if tensor.ndim != 4 or tuple(tensor.shape) != allowed:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; (batch, N, heads, head_dim) = {allowed} is allowed"
            )


def check_bias(bias: Tensor | None, query: Tensor, plan: Plan) -> None:
    """Checks shape, dtype and device of the relative position bias."""
    if bias is None:
        return
    allowed = (query.shape[-2], *(2 * axis.kernel - 1 for axis in plan.axes))
    if tuple(bias.shape) != allowed:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; (heads, 2 * kernel_size - 1 per axis) = {allowed} is allowed"
        )
    if not bias.is_floating_point():
        raise ValueError(f"bias is {bias.dtype}; a floating point dtype is allowed")
    if bias.device != query.device:
        raise ValueError(f"bias is on {bias.device} but query is on {query.device}; one device is allowed")


def check_key_mask(key_mask: Tensor | None, query: Tensor, plan: Plan, *, spare: bool) -> None:
    """Checks the mask and, unless there are `spare` keys elsewhere or a trace runs, that it leaves no query alone."""
    if key_mask is None:
        return
    allowed = tuple(query.shape[:-2])
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask is {key_mask.dtype}; torch.bool is allowed, True where a key may be seen")
    if tuple(key_mask.shape) != allowed:
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}; (batch, *grid) = {allowed} is allowed")
    if key_mask.device != query.device:
        raise ValueError(f"key_mask is on {key_mask.device} but query is on {query.device}; one device is allowed")
    if spare or torch.compiler.is_compiling():
        return
    empty = (count_visible_keys(key_mask, plan) == 0).nonzero()
    if len(empty):
        batch, *position = empty[0].tolist()
        raise ValueError(
            f"key_mask leaves {len(empty)} queries without a key, the first at position {tuple(position)} of sample "
            f"{batch}; every window must keep at least one key unless additional_keys are given"
        )


def count_visible_keys(key_mask: Tensor, plan: Plan) -> Tensor:
    """Number of keys in the window of each query that the mask leaves, by running sums along one axis after the other.

    Args:
        key_mask: (B, *grid) bool.
        plan: the windows.

    Returns:
        (B, *grid) int32.
    """
    count = key_mask.to(torch.int32)
    for dim, axis in enumerate(plan.axes, start=1):
        padded = F.pad(count.movedim(dim, -1), (axis.dilation, -axis.length % axis.dilation))
        sums = padded.unflatten(-1, (-1, axis.dilation)).cumsum(-2, dtype=torch.int32).flatten(-2)
        before = torch.from_numpy(axis.start).to(key_mask.device)  # `dilation` leading zeros: sums lag one position
        window = torch.from_numpy(axis.dilation * axis.count).to(key_mask.device)
        count = (sums[..., before + window] - sums[..., before]).movedim(-1, dim)
    return count
