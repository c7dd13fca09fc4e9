"""ResNet with polarized self-attention in its bottlenecks, as a classifier and as a network for human pose.

Attention gates the channels of the 3x3 convolution of every bottleneck, before the widening to four times as many.

Sources: Polarized Self-Attention: Towards High-quality Pixel-wise Regression, arXiv 2107.00782; Simple Baselines for
Human Pose Estimation and Tracking, arXiv 1804.06208; Deep Residual Learning, arXiv 1512.03385.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gridattn.layers import PolarizedSelfAttention
from gridattn.layers.drop_path import DropPath
from gridattn.layers.polarized import convert_official
from gridattn.models.common import Backbone, Level, drop_path_rates, linear
from gridattn.models.conv_norm import batch_counters, conv_norm
from gridattn.models.patches import check_level_lists
from gridattn.models.polarized_variants import POSE_RESNET_VARIANTS, RESNET_VARIANTS
from gridattn.models.registry import register_variants
from gridattn.ops.common import check_probability


class PolarizedResNet(Backbone):
    """ResNet of bottlenecks with polarized self-attention. Any image size is taken.

    Inside, images are channels-first; the maps have the image's size over 4, 8, 16, 32, rounded up.

    Args:
        depths: bottlenecks per level.
        planes: channels of the 3x3 convolutions, per level; a level has four times as many.
        stem_dim: channels of the stem.
        layout: of the attention, see `PolarizedSelfAttention`; None for the plain network.
        variant: of the attention, "official" or "paper".
        drop_path_rate: stochastic depth, growing linearly to this rate.
        num_classes: 0 leaves the classifier out.
        in_chans: image channels.

    Raises:
        ValueError: lists that do not have one entry per level, or a setting that the attention refuses.

    Example:
        >>> import torch
        >>> model = PolarizedResNet((1, 1), planes=(8, 16), stem_dim=8, num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        planes: Sequence[int] = (64, 128, 256, 512),
        stem_dim: int = 64,
        layout: str | None = "parallel",
        variant: str = "official",
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_level_lists(depths=depths, planes=planes)
        check_probability("drop_path_rate", drop_path_rate)
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = nn.Sequential(
            conv_norm(in_chans, stem_dim, kernel_size=7, stride=2, activation=nn.ReLU()), nn.MaxPool2d(3, 2, 1)
        )
        self.levels = nn.ModuleList()
        dim = stem_dim
        for i, width in enumerate(planes):
            blocks = []
            for j, rate in enumerate(rates[i]):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Bottleneck(dim, width, stride, polarized(width, layout, variant), rate))
                dim = Bottleneck.expansion * width
            self.levels.append(Level(blocks))
        self.feature_info = [
            {"num_chs": Bottleneck.expansion * width, "reduction": 4 * 2**i, "module": f"levels.{i}"}
            for i, width in enumerate(planes)
        ]
        self.num_features = dim
        self.norm = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head = linear(dim, num_classes) if num_classes else nn.Identity()

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, (B, h, w, C)."""
        self.check_images(images)
        x = self.patch_embed(images)
        maps = []
        for level in self.levels:
            x, _ = level(x, self.grad_checkpointing)
            maps.append(x.movedim(1, -1))
        return maps

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value."""
        renamed = {_official_name(name): tensor for name, tensor in convert_attention(state).items()}
        return batch_counters(self) | {k: t.flatten(1) if k == "head.weight" else t for k, t in renamed.items()}


class PoseResNet(PolarizedResNet):
    """Heatmaps of joints from a ResNet with polarized self-attention and transposed convolutions.

    Images (B, in_chans, H, W) give (B, num_classes, ceil(H / 4), ceil(W / 4)). As a feature extractor it gives the maps
    of the four levels and, last, the decoded one of stride 4.

    Args:
        depths: as in `PolarizedResNet`.
        planes: as in `PolarizedResNet`.
        stem_dim: as in `PolarizedResNet`.
        layout: as in `PolarizedResNet`.
        variant: as in `PolarizedResNet`.
        deconv_dims: channels of the transposed convolutions, each of which doubles the resolution.
        deconv_kernels: their widths, at least 2.
        drop_path_rate: as in `PolarizedResNet`.
        num_classes: joints; 0 leaves the last layer out.
        in_chans: image channels.

    Raises:
        ValueError: as in `PolarizedResNet`, or a transposed convolution narrower than 2.

    Source: arXiv 1804.06208, with the attention of arXiv 2107.00782.

    Example:
        >>> import torch
        >>> model = PoseResNet((1, 1), (8, 16), 8, deconv_dims=(12,), deconv_kernels=(4,), num_classes=5).eval()
        >>> model(torch.randn(1, 3, 45, 37)).shape
        torch.Size([1, 5, 12, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        planes: Sequence[int] = (64, 128, 256, 512),
        stem_dim: int = 64,
        layout: str | None = "parallel",
        variant: str = "official",
        deconv_dims: Sequence[int] = (256, 256, 256),
        deconv_kernels: Sequence[int] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        num_classes: int = 17,
        in_chans: int = 3,
    ) -> None:
        super().__init__(depths, planes, stem_dim, layout, variant, drop_path_rate, num_classes, in_chans)
        check_level_lists(deconv_dims=deconv_dims, deconv_kernels=deconv_kernels)
        if any(kernel < 2 for kernel in deconv_kernels):
            raise ValueError(f"deconv_kernels={tuple(deconv_kernels)} is not allowed; every entry must be at least 2")
        last = self.feature_info[-1]
        dims = (last["num_chs"], *deconv_dims)
        self.decoder = nn.Sequential(*map(deconv_norm, dims[:-1], deconv_dims, deconv_kernels))
        stride = last["reduction"] // 2 ** len(deconv_dims)
        self.feature_info.append({"num_chs": dims[-1], "reduction": stride, "module": "decoder"})
        self.num_features = dims[-1]
        self.head = linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_pose(self)

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> the map of every level, then the decoded one, (B, h, w, C)."""
        maps = super().forward_maps(images)
        decoded = self.decoder(maps[-1].movedim(-1, 1)).movedim(1, -1)
        stride = self.feature_info[-1]["reduction"]
        height, width = ((size + stride - 1) // stride for size in images.shape[2:])
        return [*maps, decoded[:, :height, :width]]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, num_features) -> heatmaps (B, num_classes, h, w); with `pre_logits`, `x` channels-first."""
        return (x if pre_logits else self.head(x)).movedim(-1, 1)


class Bottleneck(nn.Module):
    """y = ReLU(conv1(attention(conv3(conv1(x)))) + shortcut(x)), every convolution followed by batch normalisation.

    Args:
        dim: input channels.
        width: channels of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution.
        attention: acts on `width` channels; None for none.
        drop_path: probability of dropping the branch.
    """

    expansion = 4

    def __init__(
        self,
        dim: int,
        width: int,
        stride: int = 1,
        attention: PolarizedSelfAttention | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out_dim = self.expansion * width
        self.conv1 = conv_norm(dim, width, kernel_size=1, activation=nn.ReLU())
        self.conv2 = conv_norm(width, width, stride=stride, activation=nn.ReLU())
        self.attn = attention
        self.conv3 = conv_norm(width, out_dim, kernel_size=1)
        keeps_shape = stride == 1 and dim == out_dim
        self.shortcut = nn.Identity() if keeps_shape else conv_norm(dim, out_dim, kernel_size=1, stride=stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) -> (B, 4 width, ceil(H / stride), ceil(W / stride))."""
        y = self.conv3(channels_first(self.attn, self.conv2(self.conv1(x))))
        return (self.drop_path(y) + self.shortcut(x)).relu()


def polarized(dim: int, layout: str | None, variant: str) -> PolarizedSelfAttention | None:
    """The attention of a block, or None where the network has none."""
    return None if layout is None else PolarizedSelfAttention(dim, layout=layout, variant=variant)


def channels_first(layer: nn.Module | None, x: Tensor) -> Tensor:
    """Applies a layer of channels-last grids to (B, C, H, W); without a layer, `x` itself."""
    return x if layer is None else layer(x.movedim(1, -1)).movedim(-1, 1)


def deconv_norm(dim: int, out_dim: int, kernel_size: int) -> nn.Sequential:
    """Transposed convolution that doubles height and width, batch normalisation, ReLU."""
    padding = (kernel_size - 1) // 2
    conv = nn.ConvTranspose2d(
        dim, out_dim, kernel_size, 2, padding, output_padding=2 + 2 * padding - kernel_size, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim), nn.ReLU())


def init_pose(model: nn.Module) -> None:
    """Normal weights of deviation 0.001 in every convolution, those of the attention (linear maps here) included."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.001)


def convert_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state with the attention of its blocks, `*.deattn.*`, under our names; the rest as it is."""
    converted = {}
    for name, tensor in state.items():
        block, found, inner = name.partition(".deattn.")
        ours = convert_official({inner: tensor}) if found else {}
        converted |= {f"{block}.attn.{key}": value for key, value in ours.items()} if found else {name: tensor}
    return converted


def conv_names(name: str) -> str:
    """`conv1.weight` and `bn1.*` of a published block as entries 0 and 1 of our `conv1`, `downsample` as `shortcut`."""
    name = re.sub(r"(^|\.)conv(\d)\.(weight|bias)$", r"\1conv\2.0.\3", name)
    name = re.sub(r"(^|\.)bn(\d)\.", r"\1conv\2.1.", name)
    return name.replace(".downsample.", ".shortcut.")


def _official_name(name: str) -> str:
    """Our name of a published parameter outside of the attention."""
    name = re.sub(r"^conv1\.", "patch_embed.0.", conv_names(name))
    name = re.sub(r"^layer(\d+)\.", lambda m: f"levels.{int(m[1]) - 1}.blocks.", name)
    name = re.sub(r"^deconv_layers\.(\d+)\.", lambda m: f"decoder.{int(m[1]) // 3}.{int(m[1]) % 3}.", name)
    return re.sub(r"^(final_layer|fc)\.", "head.", name)


register_variants(PolarizedResNet, RESNET_VARIANTS, source="arXiv 2107.00782", first_conv="patch_embed.0.0")
register_variants(
    PoseResNet,
    POSE_RESNET_VARIANTS,
    source="arXiv 2107.00782, arXiv 1804.06208",
    first_conv="patch_embed.0.0",
    img_size=(256, 192),
    interpolation="bilinear",
    crop_pct=1.0,
)
