"""MaxViT: in every block a convolution, attention inside windows, and attention on lattices over the whole map.

stem -> [MBConv -> block attention -> grid attention] x depth, 4 levels, each halving the map -> head.

Source: MaxViT: Multi-Axis Vision Transformer, arXiv 2204.01697.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.maxvit import partition_state_from_official
from gridattn.layers.mbconv import MbConv, mbconv_state_from_official
from gridattn.layers.window import WindowAttention
from gridattn.models.common import Backbone, Level, drop_path_rates
from gridattn.models.maxvit_blocks import (
    ConvStem,
    Head,
    Kind,
    MaxViTBlock,
    MlpBiasWindowAttention,
    init_weights,
    norm_eps,
)
from gridattn.models.maxvit_variants import (
    RW_384_VARIANTS,
    RW_SMALL_224_VARIANTS,
    RW_VARIANTS,
    TF_224_VARIANTS,
    TF_FINE_TUNED_VARIANTS,
    XLARGE_224_VARIANTS,
)
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability, per_axis
from gridattn.ops.relative_bias import resize_relative_bias


class MaxViT(Backbone):
    """Multi-axis attention pyramid.

    Windows and lattices have img_size / partition_ratio positions an axis, at every level. Any image size is taken: a
    map that the windows do not fill is padded, and the padding is masked.

    Args:
        embed_dim: channels per level.
        depths: blocks per level; the first of each halves the map.
        stem_width: channels of the two convolutions of the stem.
        variant: details of the convolutions and normalisations: `"tf"`, the paper's models, or `"rw"`, a later form
            (SiLU, MBConvs that expand from their input's channels, fewer biases, other epsilons).
        head_dim: channels of a head.
        head_hidden_size: width of the classifier's hidden layer (LN -> mean -> linear -> tanh -> linear; the norm comes
            after the mean); None for LN -> mean -> linear.
        position: relative position biases from a `"table"`, or from an `"mlp"` of the logarithm of the offset.
        layer_scale: initial value of the attention branches' learned factors; None for none.
        parallel: both attentions see the same input, each gives half of the channels, and one feed-forward follows; two
            MBConvs lead every block.
        img_size: nominal image size.
        partition_ratio: image positions per window position.
        window_size: of windows and lattices; overrides img_size / partition_ratio.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly with the block: with `"tf"` block b of N has
            drop_path_rate * b / N, with `"rw"` the last one has the full rate.
        num_classes: 0 leaves the head out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = MaxViT((16, 32), (1, 1), stem_width=8, head_dim=8, window_size=4, num_classes=5)
        >>> model(torch.randn(1, 3, 45, 64)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        stem_width: int | Sequence[int] = 64,
        variant: Kind = "tf",
        head_dim: int = 32,
        head_hidden_size: int | None = None,
        position: Literal["table", "mlp"] = "table",
        layer_scale: float | None = None,
        parallel: bool = False,
        img_size: int | Sequence[int] = 224,
        partition_ratio: int = 32,
        window_size: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(depths=depths, embed_dim=embed_dim)
        check_choice("variant", variant, ("tf", "rw"))
        check_choice("position", position, ("table", "mlp"))
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        if head_dim < 1 or any(dim < 1 or dim % head_dim for dim in embed_dim):
            raise ValueError(f"embed_dim={tuple(embed_dim)} does not fit head_dim={head_dim}; multiples are allowed")
        if window_size is None:
            window_size = [max(1, size // partition_ratio) for size in per_axis(img_size, 2, "img_size")]
        self.window_size = per_axis(window_size, 2, "window_size")
        self.variant: Kind = variant
        self.drop_rate = drop_rate
        self.head_hidden_size = head_hidden_size

        # The published training code reaches the full rate only after the last block.
        share = (sum(depths) - 1) / sum(depths) if variant == "tf" else 1.0
        rates = drop_path_rates(drop_path_rate * share, depths)
        attention = MlpBiasWindowAttention if position == "mlp" else WindowAttention
        self.patch_embed = ConvStem(in_chans, stem_width, variant)
        self.levels = nn.ModuleList()
        previous = self.patch_embed.dim
        for dim, level_rates in zip(embed_dim, rates):
            blocks = []
            for j, rate in enumerate(level_rates):
                layers = [
                    attention(dim, dim // head_dim, window_size=self.window_size, partition=partition)
                    for partition in ("block", "grid")
                ]
                stride = 2 if j == 0 else 1
                blocks.append(MaxViTBlock(previous, dim, stride, layers, variant, parallel, rate, layer_scale))
                previous = dim
            self.levels.append(Level(blocks))

        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (i + 1), "module": f"levels.{i - 1}" if i else "patch_embed"}
            for i, dim in enumerate((self.patch_embed.dim, *embed_dim))
        ]
        self.num_features = embed_dim[-1]
        self.norm = nn.Identity() if head_hidden_size else nn.LayerNorm(self.num_features, eps=norm_eps(variant))
        self.head = self._make_head()
        self.apply(init_weights)

    def _make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        return Head(self.num_features, self.head_hidden_size, self.num_classes, norm_eps(self.variant), self.drop_rate)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the maps of the stem and of every level, (B, h, w, C)."""
        self.check_images(images)
        x = self.patch_embed(images)
        maps = [x]
        for level in self.levels:
            x, _ = level(x, self.grad_checkpointing)
            maps.append(x)
        return maps

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc if isinstance(self.head, Head) else self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a fresh one; `num_classes=0` removes it, and `forward` gives pooled features."""
        super().reset_classifier(num_classes)
        like = next(self.parameters())
        self.head = self._make_head().apply(init_weights).to(device=like.device, dtype=like.dtype)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names.

        Tables of position biases for another window are interpolated bilinearly, as in the published fine-tuning.
        """
        renamed = {official_name(name): tensor for name, tensor in super().from_official(state).items()}
        for path, module in self.named_modules():
            if isinstance(module, MbConv):
                _convert(renamed, path, mbconv_state_from_official)
            elif isinstance(module, WindowAttention):
                _convert(renamed, path, lambda part, layer=module: _attention_state(part, layer))
                name = f"{path}.relative_position_bias"
                if name in renamed and renamed[name].ndim == 3:
                    renamed[name] = resize_relative_bias(renamed[name], module.window_size, "linear")
        return renamed


OFFICIAL_NAMES = (
    (r"^stem\.", "patch_embed."),
    (r"^head\.pre_logits\.", "head.hidden."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.conv\.(?!\d)", r"levels.\1.blocks.\2.conv.0."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn_(block|grid)\.", r"levels.\1.blocks.\2.attention.\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.(?:attn_(?=block|grid))", r"levels.\1.blocks.\2.attention.both.attn."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.attn\.", r"levels.\1.blocks.\2.attention.both."),
    (r"^stages\.", "levels."),
    (r"\.ls([12])\.gamma$", r".gamma\1"),
)
"""Published names of modules and ours; what is inside MBConvs and attentions follows by their own maps."""


def official_name(name: str) -> str:
    """Our name of the module of a published parameter, and the parameter's own name in it; our names stay."""
    for pattern, ours in OFFICIAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _convert(state: dict[str, Tensor], path: str, convert: Any) -> None:
    """Replaces the entries of the module at `path` by what `convert` makes of them, unless they are ours already."""
    part = {name.removeprefix(f"{path}."): name for name in state if name.startswith(f"{path}.")}
    if not any(key.startswith(("rel_pos.", "conv1_1x1.")) for key in part):
        return
    converted = convert({key: state.pop(name) for key, name in part.items()})
    state.update({f"{path}.{key}": tensor for key, tensor in converted.items()})


def _attention_state(state: dict[str, Tensor], layer: WindowAttention) -> dict[str, Tensor]:
    """Published qkv, proj and rel_pos of one attention -> those of `WindowAttention` or `MlpBiasWindowAttention`."""
    table = state.get("rel_pos.relative_position_bias_table")
    if table is None:
        renamed = {re.sub(r"^rel_pos\.mlp\.", "position_mlp.", key): tensor for key, tensor in state.items()}
        for key in ("qkv.weight", "qkv.bias"):
            renamed[key] = rearrange(renamed[key], "(h three d) ... -> (three h d) ...", h=layer.num_heads, three=3)
        return renamed
    # A flat table does not tell its window's sides; one of another length than ours is that of a square window.
    sides = [2 * w - 1 for w in layer.window_size]
    if table.ndim == 2 and table.shape[0] != sides[0] * sides[1]:
        sides = [round(table.shape[0] ** 0.5)] * 2
    window = [(side + 1) // 2 for side in sides]
    official = {f"attn.{key}": tensor for key, tensor in state.items()}
    converted = partition_state_from_official(official, layer.num_heads, window)
    return {key.removeprefix("attn."): tensor for key, tensor in converted.items()}


SOURCE = "arXiv 2204.01697"
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
NAMES = {"first_conv": "patch_embed.conv1", "classifier": "head.fc"}
register_variants(MaxViT, TF_224_VARIANTS, source=SOURCE, crop_pct=0.95, **NAMES)
register_variants(MaxViT, XLARGE_224_VARIANTS, source=SOURCE, crop_pct=0.95, **NAMES, **HALF)
register_variants(MaxViT, TF_FINE_TUNED_VARIANTS, source=SOURCE, crop_pct=1.0, crop_mode="squash", **NAMES, **HALF)
register_variants(MaxViT, RW_VARIANTS, source=SOURCE, crop_pct=0.95, **NAMES, **HALF)
register_variants(MaxViT, RW_SMALL_224_VARIANTS, source=SOURCE, crop_pct=0.9, **NAMES, **HALF)
register_variants(MaxViT, RW_384_VARIANTS, source=SOURCE, crop_pct=1.0, **NAMES, **HALF)
