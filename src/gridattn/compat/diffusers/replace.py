"""Swapping the processors of a model's self-attentions, and giving them back."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

from torch import nn

from gridattn.compat.diffusers.processors import NeighborhoodProcessor, Setting, processor_class
from gridattn.ops.common import check_choice
from gridattn.ops.neighborhood import BACKENDS, Plan, make_plan

Sizes = int | Sequence[int]


def replace_attention(
    model: nn.Module,
    kernel_size: Sizes | Mapping[tuple[int, ...], Sizes],
    stride: Sizes | Mapping[tuple[int, ...], Sizes] = 1,
    dilation: Sizes | Mapping[tuple[int, ...], Sizes] = 1,
    *,
    grids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    modules: str | Sequence[str] = "*",
    dense_steps: int = 0,
    unmatched: Literal["error", "dense"] = "error",
    text: Literal["auto", "first", "last"] = "auto",
    text_tokens: int | None = None,
    backend: str = "auto",
) -> "ReplacedAttention":
    """Swaps the self-attention of a model of `diffusers` for neighborhood attention, in place and reversibly.

    Every image token attends to the tokens of its window and to all text tokens; text tokens attend to everything.
    With `stride` = `kernel_size` that is attention in blocks, with a stride between 1 and that strided attention.
    Cross-attention stays as it is.

    Args:
        model: such as `pipeline.unet` or `pipeline.transformer`.
        kernel_size: window per axis, as in `neighborhood_attention`; where grids need different ones, {grid: window}.
        stride: queries per axis that share a window, in the same form.
        dilation: step between the keys of a window, in the same form.
        grids: the grid of image tokens, or several where the model works at several resolutions; those that
            `kernel_size` names when None. Of a U-Net, height and width of the latent image, halved at every level; of
            a transformer, the latent sizes (frames, height, width) divided by its patch size. Tokens are in row-major
            order.
        modules: shell patterns of the names of modules to swap, such as "down_blocks.0.*".
        dense_steps: so many first steps of every sampling keep dense attention.
        unmatched: what a self-attention with another number of tokens does: raise an error, or stay dense.
        text: whether text tokens stand before or after the image tokens; "auto" knows it of common processors.
        text_tokens: number of text tokens, for models whose blocks never see text and image apart.
        backend: as in `neighborhood_attention`.

    Returns:
        What `restore` is called on to undo it; it may be used in a `with` statement.

    Raises:
        ValueError: settings that do not fit a grid, two grids with equally many tokens, no self-attention to swap or
            one that is swapped already, or `dense_steps` for a model that is called without a `timestep`. When the
            model runs: token counts other than those declared, a mask that differs between queries or heads, or a
            processor that does not call `scaled_dot_product_attention`.

    Source: arXiv 2504.16922.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> model = UNet2DModel(
        ...     sample_size=16, block_out_channels=(8, 8), norm_num_groups=2, attention_head_dim=4, layers_per_block=1,
        ...     down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        ... )
        >>> noise = torch.randn(1, 3, 16, 16)
        >>> with replace_attention(model, kernel_size=4, stride=4, grids=[(16, 16), (8, 8)]) as replaced:
        ...     _ = model(noise, 1)
        >>> replaced.calls
        Counter({'neighborhood': 4})
    """
    check_choice("unmatched", unmatched, ("error", "dense"))
    check_choice("text", text, ("auto", "first", "last"))
    check_choice("backend", backend, ("auto", *BACKENDS))
    for name, value in (("dense_steps", dense_steps), ("text_tokens", 0 if text_tokens is None else text_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r} is not allowed; it must be an int of at least 0")
    plans = _make_plans(grids, {"kernel_size": kernel_size, "stride": stride, "dilation": dilation})
    if dense_steps and "timestep" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"dense_steps={dense_steps} is not allowed for {type(model).__name__}: its forward takes no timestep"
        )
    found = _self_attentions(model, [modules] if isinstance(modules, str) else list(modules))
    return ReplacedAttention(model, found, Setting(plans, dense_steps, unmatched, text, text_tokens, backend))


def _make_plans(grids: Any, sizes: Mapping[str, Any]) -> dict[int, Plan]:
    """Neighborhood attention by the number of tokens of its grid."""
    if grids is None and not isinstance(sizes["kernel_size"], Mapping):
        raise ValueError("grids=None is allowed only where kernel_size names the grids, as in {(64, 64): 16}")
    plans: dict[int, Plan] = {}
    for grid in _list_grids(list(sizes["kernel_size"]) if grids is None else grids):
        own = {name: _of_grid(name, value, grid) for name, value in sizes.items()}
        plan, tokens = make_plan(grid, **own), prod(grid)
        if tokens in plans:
            raise ValueError(
                f"grids={plans[tokens].grid} and {grid} have {tokens} tokens each; grids are told apart by their "
                "number of tokens"
            )
        plans[tokens] = plan
    return plans


def _of_grid(name: str, value: Any, grid: tuple[int, ...]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if grid not in value:
        raise ValueError(f"{name}={dict(value)!r} names no value for the grid {grid}")
    return value[grid]


def _list_grids(grids: Any) -> list[tuple[int, ...]]:
    single = isinstance(grids, Sequence) and len(grids) > 0 and all(isinstance(n, int) for n in grids)
    listed = [grids] if single else grids
    if not isinstance(listed, Sequence) or not listed or not all(_is_grid(grid) for grid in listed):
        raise ValueError(f"grids={grids!r} is not allowed; a grid such as (64, 64), or a list of grids, is")
    return [tuple(grid) for grid in listed]


def _is_grid(grid: Any) -> bool:
    return isinstance(grid, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid)


def _self_attentions(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Modules by name that have a processor and attend to what they are given."""
    attentions = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "processor") and hasattr(module, "set_processor")
    }
    if not attentions:
        raise ValueError(f"model={type(model).__name__} has no attention with a processor, as models of diffusers have")
    found = {
        name: module
        for name, module in attentions.items()
        if not getattr(module, "is_cross_attention", False) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not found:
        raise ValueError(
            f"modules={patterns!r} matches none of the {len(attentions)} attentions of {type(model).__name__}, such as "
            f"{next(iter(attentions))!r}, that is not cross-attention"
        )
    taken = [name for name, module in found.items() if isinstance(module.processor, NeighborhoodProcessor)]
    if taken:
        raise ValueError(
            f"model={type(model).__name__} has a replaced attention already, {taken[0]!r}; restore it first"
        )
    return found


class ReplacedAttention:
    """The swapped attentions of a model; leaving a `with` block restores them.

    Attributes:
        modules: names of the swapped attentions.
        calls: how many attentions were computed as "neighborhood" and as "dense" so far.
        step: the step of sampling that the model is at, from 0; counted only with `dense_steps`. A step is a call with
            a smaller timestep than the one before, and a larger one begins a new sampling.
    """

    def __init__(self, model: nn.Module, attentions: Mapping[str, nn.Module], setting: Setting) -> None:
        self.modules = list(attentions)
        self._setting = setting
        self._swapped = []
        for name, module in attentions.items():
            original: Any = module.processor
            processor = processor_class(type(original))(original, name, setting)
            self._swapped.append((name, module, original, processor))
        for _, module, _, processor in self._swapped:
            module.set_processor(processor)  # pyright: ignore[reportCallIssue]
        self._hook = model.register_forward_pre_hook(self._begin, with_kwargs=True) if setting.dense_steps else None

    @property
    def calls(self) -> Counter[str]:
        return self._setting.calls

    @property
    def step(self) -> int:
        return self._setting.step

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        if given.get("timestep") is None:
            raise ValueError("timestep=None is not allowed with dense_steps")
        self._setting.begin(given["timestep"])

    def restore(self) -> None:
        """Gives every attention its original processor back; a second call does nothing.

        Raises:
            ValueError: a processor was exchanged in the meantime, for instance by another replacement that has to be
                restored first.
        """
        for name, module, _, processor in self._swapped:
            if module.processor is not processor:
                raise ValueError(
                    f"processor={type(module.processor).__name__} of {name} was set after replace_attention; undo that "
                    "first"
                )
        for _, module, original, _ in self._swapped:
            module.set_processor(original)  # pyright: ignore[reportCallIssue]
        self._swapped = []
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "ReplacedAttention":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
