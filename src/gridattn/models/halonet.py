"""HaloNet: residual bottlenecks whose middle layer is local attention of blocks with a halo around them.

stem -> bottlenecks, 4 levels -> optional 1x1 convolution -> mean -> linear. Hybrids have 3x3 convolutions in
some blocks.

Source: Scaling Local Self-Attention for Parameter Efficient Visual Backbones, arXiv 2103.12731.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.halo import HaloAttention, halo_state_from_official
from gridattn.models.common import Backbone, Level, drop_path_rates, linear
from gridattn.models.conv_norm import batch_counters
from gridattn.models.halonet_blocks import (
    ACTIVATIONS,
    STEMS,
    Bottleneck,
    ChannelMixingConv,
    ConvNorm,
    Stem,
    init_weights,
    multiple_of_8,
)
from gridattn.models.halonet_variants import HYBRID_94_VARIANTS, HYBRID_VARIANTS, PAPER_VARIANTS, REGNETZ_VARIANTS
from gridattn.models.patches import check_level_lists
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_choice, check_probability
from gridattn.ops.relative_bias import resize_relative_bias


class HaloNet(Backbone):
    """Bottlenecks with halo attention, or with it in some blocks of a ResNet.

    Any image size is taken. Positions outside a map, those that fill up its last blocks included, take part in the
    attention as zero keys and values, as in the networks that were published.

    Args:
        depths: blocks per level.
        widths: channels of a level's output.
        strides: of the first block of every level; the others have 1.
        halo_blocks: per level, the places of the blocks with halo attention; None for all blocks.
        bottleneck_ratio: channels inside a block over those of its output, rounded to a multiple of 8; one number or
            one per level.
        inverted: that ratio is over the block's input, blocks end without activation, and have no shortcut where the
            shape changes.
        num_heads: one number, or one per level.
        block_size: side of the blocks of queries; one number, or one per level. A block as large as its level's map
            and no halo make full attention.
        halo_size: positions around a block that its queries see; one number, or one per level.
        value_ratio: channels of the values over those inside the block.
        head_dim: channels of a head's queries and keys; see `HaloAttention`.
        qk_ratio: query channels over value channels, where `head_dim` and `value_ratio` leave them open.
        stem: `"7x7"`, `"3x3"`, or `"tiered"`, three 3 x 3 convolutions of growing width.
        stem_width: channels of its output.
        stem_pool: whether a max pool ends the stem.
        activation: `"relu"` or `"silu"`.
        group_width: channels of a group of the 3 x 3 convolutions; None for one group.
        channel_attention: after these, `"se"`, `"eca"` or None.
        squeeze_ratio: channels inside `"se"` over its input.
        final_width: channels of a last 1 x 1 convolution; None for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting outside its range.

    Example:
        >>> import torch
        >>> model = HaloNet((1, 1), (16, 32), (1, 2), num_heads=2, block_size=4, halo_size=1, num_classes=5)
        >>> model(torch.randn(1, 3, 45, 64)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 10, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2),
        halo_blocks: Sequence[Sequence[int]] | None = None,
        bottleneck_ratio: float | Sequence[float] = 1.0,
        inverted: bool = False,
        num_heads: int | Sequence[int] = (4, 8, 8, 8),
        block_size: int | Sequence[int] = 8,
        halo_size: int | Sequence[int] = 3,
        value_ratio: float = 1.0,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        stem: str = "7x7",
        stem_width: int = 64,
        stem_pool: bool = True,
        activation: str = "relu",
        group_width: int | None = None,
        channel_attention: str | None = None,
        squeeze_ratio: float = 1 / 16,
        final_width: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_choice("stem", stem, tuple(STEMS))
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("channel_attention", channel_attention, (None, "se", "eca"))
        check_probability("drop_rate", drop_rate)
        check_probability("drop_path_rate", drop_path_rate)
        ratios = [bottleneck_ratio] * len(depths) if isinstance(bottleneck_ratio, int | float) else bottleneck_ratio
        heads, block_sizes, halo_sizes = (
            [value] * len(depths) if isinstance(value, int) else value for value in (num_heads, block_size, halo_size)
        )
        places = [range(depth) for depth in depths] if halo_blocks is None else halo_blocks
        check_level_lists(
            depths=depths,
            widths=widths,
            strides=strides,
            halo_blocks=places,
            bottleneck_ratio=ratios,
            num_heads=heads,
            block_size=block_sizes,
            halo_size=halo_sizes,
        )
        for depth, level_places in zip(depths, places):
            if any(not 0 <= place < depth for place in level_places):
                raise ValueError(f"halo_blocks={halo_blocks} names a block that depths={tuple(depths)} does not have")

        def make_middle(i: int, j: int, hidden: int, stride: int) -> tuple[nn.Module, int]:
            """The middle layer of block j of level i, and the channels of its output."""
            if j not in places[i]:
                return (
                    ChannelMixingConv(hidden, stride, group_width, activation, channel_attention, squeeze_ratio),
                    hidden,
                )
            values = int(value_ratio * hidden)
            layer = HaloAttention(
                hidden,
                heads[i],
                block_size=block_sizes[i],
                halo_size=halo_sizes[i],
                stride=stride,
                dim_out=values,
                # Queries and keys keep the block's width where the values are wider.
                head_dim=hidden // heads[i] if head_dim is None and values != hidden else head_dim,
                qk_ratio=qk_ratio,
                mask_padding=False,
            )
            return layer, values

        rates = drop_path_rates(drop_path_rate, depths)
        self.drop_rate = drop_rate
        self.patch_embed = Stem(in_chans, stem_width, stem, stem_pool, activation)
        self.levels = nn.ModuleList()
        previous = stem_width
        for i, (dim, level_rates) in enumerate(zip(widths, rates)):
            blocks = []
            for j, rate in enumerate(level_rates):
                stride = strides[i] if j == 0 else 1
                hidden = multiple_of_8(ratios[i] * (previous if inverted else dim))
                middle, middle_dim = make_middle(i, j, hidden, stride)
                blocks.append(Bottleneck(previous, hidden, dim, stride, middle, middle_dim, activation, inverted, rate))
                previous = dim
            self.levels.append(Level(blocks))
        self.final_conv = (
            nn.Identity() if final_width is None else ConvNorm(previous, final_width, activation=activation)
        )

        self.num_features = final_width or previous
        self.feature_info = [{"num_chs": self.patch_embed.tap_dim, "reduction": 2, "module": "patch_embed"}]
        for i, dim in enumerate(widths):
            reduction = self.patch_embed.reduction * prod(strides[: i + 1])
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"levels.{i}"})
        if final_width is not None:
            self.feature_info[-1] |= {"num_chs": final_width, "module": "final_conv"}
        self.norm = nn.Identity()
        self.head = self._make_head()
        self.apply(init_weights)

    def _make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        fc = linear(self.num_features, self.num_classes)
        return nn.Sequential(OrderedDict(drop=nn.Dropout(self.drop_rate), fc=fc))

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the stem's map of stride 2 and the map of every level, (B, h, w, C)."""
        self.check_images(images)
        tap, x = self.patch_embed(images)
        maps = [tap]
        for level in self.levels:
            x, _ = level(x, self.grad_checkpointing)
            maps.append(x)
        maps[-1] = self.final_conv(x)
        return maps

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.get_submodule("fc") if self.num_classes else self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a fresh one; `num_classes=0` removes it, and `forward` gives pooled features."""
        super().reset_classifier(num_classes)
        like = next(self.parameters())
        self.head = self._make_head().to(device=like.device, dtype=like.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of the tables of relative vectors."""
        return {name for name, _ in self.named_parameters() if ".relative." in name}

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value.

        Tables of relative vectors for another window are interpolated linearly.
        """
        renamed = batch_counters(self)
        renamed |= {official_name(name): tensor for name, tensor in super().from_official(state).items()}
        for path, module in self.named_modules():
            if isinstance(module, HaloAttention):
                self._convert_halo(renamed, path, module)
            elif path.endswith((".fc1", ".fc2")) and f"{path}.weight" in renamed:
                renamed[f"{path}.weight"] = renamed[f"{path}.weight"].flatten(1)
        return renamed

    @staticmethod
    def _convert_halo(state: dict[str, Tensor], path: str, layer: HaloAttention) -> None:
        inside = {name.removeprefix(f"{path}."): name for name in state if name.startswith(f"{path}.")}
        part = {key: state.pop(inside[key]) for key in inside if key.startswith(("q.", "kv.", "qkv.", "pos_embed."))}
        if "qkv.weight" in part:
            query, key_value = part.pop("qkv.weight").split([layer.query.out_features, layer.key_value.out_features])
            part |= {
                "q.weight": query,
                "kv.weight": rearrange(key_value, "(two h d) ... -> (h two d) ...", two=2, h=layer.num_heads),
            }
        part = halo_state_from_official(part)
        state.update({f"{path}.{key}": tensor for key, tensor in part.items()})
        for axis, (block, halo) in enumerate(zip(layer.block_size, layer.halo_size)):
            name = f"{path}.relative.{axis}"
            if name in state:
                state[name] = resize_relative_bias(state[name].T, (block + 2 * halo,)).T


OFFICIAL_NAMES = (
    (r"^stem\.(conv|bn)\.", r"patch_embed.conv1.\1."),
    (r"^stem\.", "patch_embed."),
    (r"^stages\.(\d+)\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"\.conv1_1x1\.", ".conv1."),
    (r"\.conv2_kxk\.", ".middle.conv."),
    (r"\.attn\.", ".middle.attn."),
    (r"\.self_attn\.", ".middle."),
    (r"\.post_attn\.", ".norm."),
    (r"\.conv3_1x1\.", ".conv3."),
)
"""Published names and ours; what is inside a halo layer follows by its own map."""


def official_name(name: str) -> str:
    """Our name of a published parameter; names that are ours already stay."""
    if name.startswith("levels."):
        return name
    for pattern, ours in OFFICIAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name


SOURCE = "arXiv 2103.12731"
NAMES = {"first_conv": "patch_embed.conv1.conv", "classifier": "head.fc"}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
for _name, (_size, _config) in PAPER_VARIANTS.items():
    register_variants(HaloNet, {_name: _config}, source=SOURCE, img_size=_size, crop_pct=0.95, **NAMES)
register_variants(HaloNet, HYBRID_VARIANTS, source=SOURCE, img_size=256, crop_pct=0.95, **NAMES)
register_variants(HaloNet, HYBRID_94_VARIANTS, source=SOURCE, img_size=256, crop_pct=0.94, **NAMES)
register_variants(HaloNet, REGNETZ_VARIANTS, source=SOURCE, crop_pct=0.94, **NAMES, **HALF)
