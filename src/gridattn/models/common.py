"""What backbones share: an interface as in timm, residual blocks around a grid attention, and their inputs."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gridattn.layers import GridAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.mlp import Mlp
from gridattn.models.state import load_strict


class AttentionInput(NamedTuple):
    """An attention layer of a network and what it was given: `name` is its module path, `x` is (B, *grid, C)."""

    name: str
    layer: GridAttention
    x: Tensor


class Backbone(nn.Module):
    """An image classifier whose body also gives feature maps.

    A family sets `num_features` (channels of the last map), `feature_info` (one dict a map: `num_chs`, `reduction`,
    `module`), `norm` and `head`, and defines `forward_maps`. Everything inside is channels-last, (B, *grid, C).

    Attributes:
        tap_norm: whether the maps are not normalised yet, so that a feature extractor gives each its own LayerNorm.
        official_ignored: patterns (`re.search`) of names in published files that hold nothing to load, and why.
        config: the call of `create_model` that rebuilds the model; empty for one that was built otherwise.
        default_cfg: input size, normalisation and names of the first and last layer, as in timm.
    """

    tap_norm: ClassVar[bool] = False
    official_ignored: ClassVar[Mapping[str, str]] = {}
    num_features: int
    num_classes: int
    feature_info: list[dict[str, Any]]
    norm: nn.Module
    head: nn.Module

    def __init__(self, in_chans: int, num_classes: int, rank: int = 2) -> None:
        super().__init__()
        for name, value, minimum in (("in_chans", in_chans, 1), ("num_classes", num_classes, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name}={value!r} is not allowed; it must be an int of at least {minimum}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.rank = rank
        self.grad_checkpointing = False
        self.config: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, *size) -> one map (B, *grid, C) for each entry of `feature_info`."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, *size) -> the last map, normalised, (B, *grid, num_features)."""
        return self.norm(self.forward_maps(images)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, *grid, num_features) -> the mean over positions and, unless `pre_logits`, its logits (B, num_classes)."""
        pooled = x.flatten(1, -2).mean(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, *size) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict of the family under our names; names that are ours already stay.

        A family extends this; every tensor is given on, but for those that `official_ignored` names.
        """
        return {name: tensor for name, tensor in state.items() if self.ignored_reason(name) is None}

    def ignored_reason(self, name: str) -> str | None:
        """Why a tensor of published files holds nothing to load; None where it does."""
        return next((why for pattern, why in self.official_ignored.items() if re.search(pattern, name)), None)

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Loads the published state dict of the family, strictly."""
        load_strict(self, self.from_official(state))

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError unless `images` is (B, in_chans, *size) with as many axes as the model's grid."""
        if images.ndim != self.rank + 2 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; {type(self).__name__} takes "
                f"(batch, {self.in_chans} channels, {self.rank} axes)"
            )

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one; `num_classes=0` removes it, and `forward` gives pooled features."""
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(device=like.device, dtype=like.dtype)
        if self.config:
            self.config["num_classes"] = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides biases and norms: tables of positions."""
        return {name for name, _ in self.named_parameters() if "position" in name.rsplit(".", 1)[-1]}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a sequence of groups, for layer-wise learning rates."""
        level = r"^levels\.(\d+)"
        fine = [(level + r"\.(?:downsample|position|norm)", (0,)), (level + r"\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": level if coarse else [*fine, (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def attention_layers(self) -> list[tuple[str, GridAttention]]:
        """(module path, layer) of every attention layer, in the order of the network."""
        return attention_layers(self)

    def attention_inputs(self, images: Tensor) -> list[AttentionInput]:
        """What every attention layer is given for `images`; see the function of the same name."""
        return attention_inputs(self, images)


def attention_layers(model: nn.Module) -> list[tuple[str, GridAttention]]:
    """(module path, layer) of the attention layers of any network; a layer inside another is not listed."""
    found: list[tuple[str, GridAttention]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, GridAttention) and not inside:
            found.append((name, module))
    return found


@torch.no_grad()
def attention_inputs(model: nn.Module, images: Tensor) -> list[AttentionInput]:
    """Runs a network once, in eval mode, and collects what each of its attention layers was given.

    Args:
        model: any network with `GridAttention` layers.
        images: its input.

    Returns:
        One entry per call of a layer, in the order of the calls.

    Example:
        >>> from gridattn.models import create_model
        >>> model = create_model("grid_vit_micro", attention="window")
        >>> [tuple(x.shape) for name, layer, x in model.attention_inputs(torch.randn(1, 3, 64, 64))][0]
        (1, 16, 16, 48)
    """
    found: list[AttentionInput] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep_input(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            layout = options.get("layout")
            x = args[0] if layout is None else layout.to_grid(args[0])
            found.append(AttentionInput(name, layer, x))  # pyright: ignore

        return keep_input

    training = [module for module in model.modules() if module.training]
    hooks = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in attention_layers(model)]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return found


class Block(nn.Module):
    """Pre-norm residual block: x + g1 * attention(LN(x)), then x + g2 * MLP(LN(x)).

    Args:
        attention: a layer (B, *grid, C) -> (B, *grid, C).
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability of dropping a branch.
        dropout: inside the MLP.
        layer_scale: initial value of g1 and g2, one learned factor a channel; None for none.
        norm_eps: of both LayerNorms.
    """

    def __init__(
        self,
        attention: GridAttention,
        mlp_ratio: float,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))
        self.gamma2 = None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C); the options go to the attention."""
        attended = self.attn(self.norm1(x), **options)
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        mixed = self.mlp(self.norm2(x))
        return x + self.drop_path(mixed if self.gamma2 is None else self.gamma2 * mixed)


class Level(nn.Module):
    """Blocks of one resolution, led by an optional position encoding, followed by an optional norm and downsampler."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: nn.Module | None = None,
        position: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.position = position
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.downsample = downsample

    def forward(self, x: Tensor, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """(B, *grid, C) -> the level's map, and the same downsampled for the next level."""
        if self.position is not None:
            x = self.position(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
        if self.norm is not None:
            x = self.norm(x)
        return x, x if self.downsample is None else self.downsample(x)


def linear(dim: int, out: int) -> nn.Linear:
    """A classifier, initialised like the rest: weights truncated normal with deviation 0.02, bias zero."""
    layer = nn.Linear(dim, out)
    init_linear(layer)
    return layer


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: truncated normal weights of deviation 0.02 and zero bias in every Linear."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates growing linearly from 0 to `rate` over all blocks, by level.

    Example:
        >>> drop_path_rates(0.25, (2, 2, 2))[2]
        [0.2, 0.25]
    """
    rates = [rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
    ends = [sum(depths[:i]) for i in range(len(depths) + 1)]
    return [rates[start:stop] for start, stop in pairwise(ends)]


def conv_channels_last(conv: nn.Module, x: Tensor) -> Tensor:
    """Applies a convolution to (B, *grid, C)."""
    return conv(x.movedim(-1, 1)).movedim(1, -1)
