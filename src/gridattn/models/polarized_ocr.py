"""Semantic segmentation with object-contextual representations on HRNet with polarized self-attention.

body -> class scores -> one vector a class -> every pixel attends to the class vectors -> class scores. The multi-scale
form runs at several image sizes and weighs their scores by a learned map.

Sources: Object-Contextual Representations, arXiv 1909.11065; Hierarchical Multi-Scale Attention, arXiv 2005.10821;
Polarized Self-Attention, arXiv 2107.00782.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.models.common import Backbone
from gridattn.models.conv_norm import batch_counters
from gridattn.models.polarized_hrnet import resize
from gridattn.models.state import load_strict


class ObjectContextNet(nn.Module):
    """Segmentation network with object-contextual representations.

    Args:
        body: a backbone whose `forward_features` gives one map of `num_features` channels, such as `PolarizedHRNet`.
        num_classes: classes K.
        dim: channels of the pixel features and of the class vectors.
        key_dim: channels of queries, keys and values.

    Source: arXiv 1909.11065.

    Example:
        >>> from gridattn.models import PolarizedHRNet
        >>> body = PolarizedHRNet(8, depths=(1, 1, 1, 1), blocks=1, num_classes=0)
        >>> model = ObjectContextNet(body, num_classes=5, dim=16, key_dim=8).eval()
        >>> model(torch.randn(1, 3, 45, 37))["pred"].shape
        torch.Size([1, 5, 45, 37])
    """

    def __init__(self, body: Backbone, num_classes: int = 19, dim: int = 512, key_dim: int = 256) -> None:
        super().__init__()
        self.body = body
        joined = body.num_features
        self.aux_head = nn.Sequential(conv_norm_relu(joined, joined, bias=True), nn.Conv2d(joined, num_classes, 1))
        self.features = conv_norm_relu(joined, dim, kernel_size=3, bias=True)
        self.query = nn.Sequential(conv_norm_relu(dim, key_dim), conv_norm_relu(key_dim, key_dim))
        self.key = nn.Sequential(conv_norm_relu(dim, key_dim), conv_norm_relu(key_dim, key_dim))
        self.value = conv_norm_relu(dim, key_dim)
        self.context = conv_norm_relu(key_dim, dim)
        self.join = nn.Sequential(*conv_norm_relu(2 * dim, dim), nn.Dropout2d(0.05))
        self.head = nn.Conv2d(dim, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, in_chans, H, W) -> logits `pred` and, from before the attention, `aux`, each (B, K, H, W)."""
        features, aux = self.object_features(images)
        size = images.shape[2:]
        return {"pred": resize(self.head(features), size, "bilinear"), "aux": resize(aux, size, "bilinear")}

    def object_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_chans, H, W) -> pixel features after the attention (B, dim, h, w) and class scores (B, K, h, w)."""
        joined = self.body.forward_features(images).movedim(-1, 1)
        aux = self.aux_head(joined)
        pixels = self.features(joined)
        share = rearrange(aux, "b k h w -> b k (h w)").softmax(-1)
        classes = rearrange(share @ rearrange(pixels, "b c h w -> b (h w) c"), "b k c -> b c k 1")
        return self.join(torch.cat([self.attend(pixels, classes), pixels], 1)), aux

    def attend(self, pixels: Tensor, classes: Tensor) -> Tensor:
        """Every pixel attends to the class vectors: (B, dim, h, w) and (B, dim, K, 1) -> (B, dim, h, w)."""
        query, key, value = (
            rearrange(x, "b c h w -> b (h w) c") for x in (self.query(pixels), self.key(classes), self.value(classes))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.context(rearrange(attended, "b (h w) c -> b c h w", h=pixels.shape[2]))

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict under our names; counters of batches that are missing keep their value."""
        prefix = "backbone."
        body = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        converted = {f"body.{name}": tensor for name, tensor in self.body.from_official(body).items()} if body else {}
        for name, tensor in state.items():
            if not name.startswith(prefix):
                module, _, leaf = name.rpartition(".")
                converted[f"{OFFICIAL_NAMES.get(module, module)}.{leaf}"] = tensor
        return batch_counters(self) | converted

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Loads a published state dict, strictly."""
        load_strict(self, self.from_official(state))


class MultiScaleObjectContextNet(ObjectContextNet):
    """Object-contextual segmentation at several image sizes, with an attention map that weighs a size against the next.

    Args:
        body: as in `ObjectContextNet`.
        num_classes: as in `ObjectContextNet`.
        dim: as in `ObjectContextNet`.
        key_dim: as in `ObjectContextNet`.
        scale_dim: channels inside of the attention over sizes.

    Source: arXiv 2005.10821.

    Example:
        >>> from gridattn.models import PolarizedHRNet
        >>> body = PolarizedHRNet(8, depths=(1, 1, 1, 1), blocks=1, num_classes=0)
        >>> model = MultiScaleObjectContextNet(body, num_classes=5, dim=16, key_dim=8, scale_dim=8).eval()
        >>> sorted(model(torch.randn(1, 3, 46, 36)))
        ['attn_05x', 'attn_10x', 'aux', 'pred', 'pred_05x', 'pred_10x']
    """

    def __init__(
        self, body: Backbone, num_classes: int = 19, dim: int = 512, key_dim: int = 256, scale_dim: int = 256
    ) -> None:
        super().__init__(body, num_classes, dim, key_dim)
        self.scale_attention = nn.Sequential(
            conv_norm_relu(dim, scale_dim, kernel_size=3),
            conv_norm_relu(scale_dim, scale_dim, kernel_size=3),
            nn.Conv2d(scale_dim, 1, 1, bias=False),
        )

    def forward(self, images: Tensor, scales: Sequence[float] = (0.5, 1.0)) -> dict[str, Tensor]:
        """Scores of all sizes, from the largest down: a smaller size replaces what its attention claims.

        With a_s and z_s the attention and the logits at scale s: p <- a_s z_s + (1 - a_s) p. At s >= 1, p is resized to
        the size of z_s, and at s < 1, a_s z_s and a_s to that of p.

        Args:
            images: (B, in_chans, H, W).
            scales: factors of the image's size; 1 must be among them.

        Returns:
            `pred` and `aux` (B, K, H, W), and per scale, at its own size, `pred_10x` (B, K, h, w) and `attn_10x`
            (B, 1, h, w) for the scale 1.0, `05x` for 0.5.

        Raises:
            ValueError: scales without 1, or not positive.
        """
        if 1.0 not in scales or min(scales) <= 0:
            raise ValueError(f"scales={tuple(scales)} is not allowed; they must be positive and have 1.0 among them")
        scores: dict[str, Tensor] = {}
        result: dict[str, Tensor] = {}
        for scale in sorted(scales, reverse=True):
            found = self.one_scale(images, scale)
            attention = found.pop("attn")
            label = f"{float(scale)}x".replace(".", "")
            result |= {f"pred_{label}": found["pred"], f"attn_{label}": attention}
            scores = {key: blend(scores[key], z, attention, scale) for key, z in found.items()} if scores else found
        return result | scores

    def one_scale(self, images: Tensor, scale: float) -> dict[str, Tensor]:
        """`pred`, `aux` and `attn` of the images resized by `scale`, at the resized images' size."""
        size = [max(1, int(side * scale)) for side in images.shape[2:]]
        features, aux = self.object_features(resize(images, size, "bilinear"))
        maps = {"pred": self.head(features), "aux": aux, "attn": self.scale_attention(features).sigmoid()}
        return {key: resize(x, size, "bilinear") for key, x in maps.items()}


def blend(larger: Tensor, logits: Tensor, attention: Tensor, scale: float) -> Tensor:
    """attention * logits + (1 - attention) * larger, at the size of `logits` for scales from 1 up, else of `larger`."""
    claimed = attention * logits
    if scale >= 1.0:
        return claimed + (1.0 - attention) * resize(larger, logits.shape[2:], "bilinear")
    size = larger.shape[2:]
    return resize(claimed, size, "bilinear") + (1.0 - resize(attention, size, "bilinear")) * larger


def conv_norm_relu(dim: int, out_dim: int, kernel_size: int = 1, bias: bool = False) -> nn.Sequential:
    """Convolution of odd width that keeps the size, batch normalisation, ReLU."""
    conv = nn.Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim), nn.ReLU())


_OBJECT = "ocr.ocr_distri_head.object_context_block"
OFFICIAL_NAMES = {
    "ocr.conv3x3_ocr.0": "features.0",
    "ocr.conv3x3_ocr.1.0": "features.1",
    "ocr.aux_head.0": "aux_head.0.0",
    "ocr.aux_head.1.0": "aux_head.0.1",
    "ocr.aux_head.2": "aux_head.1",
    "ocr.cls_head": "head",
    "ocr.ocr_distri_head.conv_bn_dropout.0": "join.0",
    "ocr.ocr_distri_head.conv_bn_dropout.1.0": "join.1",
    **{
        f"{_OBJECT}.{theirs}.{index}": f"{ours}.{position}"
        for theirs, ours in (("f_pixel", "query"), ("f_object", "key"))
        for index, position in (("0", "0.0"), ("1.0", "0.1"), ("2", "1.0"), ("3.0", "1.1"))
    },
    **{
        f"{_OBJECT}.{theirs}.{index}": f"{ours}.{position}"
        for theirs, ours in (("f_down", "value"), ("f_up", "context"))
        for index, position in (("0", "0"), ("1.0", "1"))
    },
    **{f"scale_attn.conv{i}": f"scale_attention.{i}.0" for i in range(2)},
    **{f"scale_attn.bn{i}": f"scale_attention.{i}.1" for i in range(2)},
    "scale_attn.conv2": "scale_attention.2",
}
"""Published module -> ours, outside of the body."""
