"""The plain vision transformer that hosts the branches of DCAL, with timm's names."""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from timm.layers import StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from gridattn.layers.global_local import DualCrossBlock
from gridattn.models.patches import PatchEmbed, pad_to_multiple
from gridattn.ops.common import check_channels, per_axis
from gridattn.ops.resize import resize_table

HYBRID_STRIDE = 16
HYBRID_CHANNELS = 1024


class ResNetStem(nn.Module):
    """The first three stages of a ResNet-50 V2 (convolutions of standardised weights), then a 1x1 convolution.

    Args:
        dim: channels of the output.

    Example:
        >>> ResNetStem(24)(torch.randn(1, 3, 40, 32)).shape
        torch.Size([1, 3, 2, 24])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = ResNetV2(
            layers=[3, 4, 9],
            num_classes=0,
            global_pool="",
            preact=False,
            stem_type="same",
            conv_layer=partial(StdConv2dSame, eps=1e-8),  # pyright: ignore[reportArgumentType]
        )
        self.proj = nn.Conv2d(HYBRID_CHANNELS, dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H / 16), ceil(W / 16), dim)."""
        return self.proj(self.backbone(pad_to_multiple(images, HYBRID_STRIDE))).movedim(1, -1)


class ViT(nn.Module):
    """Patches, class token, position embedding, pre-norm blocks and a norm; see `DCAL` for what reads them.

    Args:
        img_size: nominal height and width.
        patch_size: side of the patches.
        embed_dim: channels D.
        num_heads: heads.
        mlp_ratio: channels inside the feed-forwards, as a multiple of `embed_dim`.
        drop_path: of each of the L blocks.
        hybrid: patches come from a `ResNetStem`, of which `patch_size` is then the stride, 16.

    Raises:
        ValueError: a setting outside its range.

    Example:
        >>> vit = ViT(32, 4, 24, 3, 2.0, [0.0, 0.0])
        >>> [x.shape for x in vit.streams(torch.randn(1, 3, 30, 15))]
        [torch.Size([1, 33, 24]), torch.Size([1, 33, 24])]
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        *,
        hybrid: bool = False,
    ) -> None:
        super().__init__()
        check_channels(embed_dim, num_heads)
        (self.stride,) = per_axis(patch_size, 1, "patch_size")
        if hybrid and self.stride != HYBRID_STRIDE:
            raise ValueError(f"patch_size={patch_size} is not allowed with hybrid=True; {HYBRID_STRIDE} is")
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, int | float) or int(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio={mlp_ratio!r} is not allowed; it must leave at least one channel")
        self.embed_dim, self.hidden = embed_dim, int(embed_dim * mlp_ratio)
        self.grid = self.grid_for(per_axis(img_size, 2, "img_size"))
        self.patch_embed = ResNetStem(embed_dim) if hybrid else PatchEmbed(3, embed_dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList(DualCrossBlock(embed_dim, num_heads, mlp_ratio, rate) for rate in drop_path)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def grid_for(self, size: Sequence[int]) -> tuple[int, int]:
        """Patches along height and width of an image of a size; the image is padded with zeros at its ends."""
        return -(-size[0] // self.stride), -(-size[1] // self.stride)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patches along height and width of images (B, 3, H, W)."""
        return self.grid_for(images.shape[-2:])

    def embed(self, images: Tensor) -> Tensor:
        """X_0: class token and patches in row-major order with their positions, (B, 3, H, W) -> (B, 1 + N, D)."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[-2:]:
            raise ValueError(f"images of shape {tuple(images.shape)} are not allowed; (B, 3, H, W) is")
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], dim=1)
        return tokens + position_table(self.pos_embed, self.grid, tuple(patches.shape[1:3]))

    def streams(self, images: Tensor) -> list[Tensor]:
        """X_0 to X_(L-1), what each block takes: (B, 3, H, W) -> L times (B, 1 + N, D)."""
        tokens = [self.embed(images)]
        for block in self.blocks[:-1]:
            tokens.append(block(tokens[-1]))
        return tokens

    def last(self, tokens: Tensor) -> Tensor:
        """X_(L-1) -> the class token of X_L, (B, D); nothing else of X_L is read by any branch."""
        return self.blocks[-1](tokens[:, :1], context=tokens)[:, 0]


def position_table(table: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Position embeddings of another grid: bicubic for the patches, the class token's entry kept.

    Args:
        table: (1, 1 + h w, D), of the class token and of the patches in row-major order.
        grid: its h and w.
        wanted: h' and w'.

    Returns:
        (1, 1 + h' w', D).

    Raises:
        ValueError: a table of another length than the grid's.

    Example:
        >>> position_table(torch.randn(1, 1 + 4 * 4, 8), (4, 4), (3, 7)).shape
        torch.Size([1, 22, 8])
    """
    if table.shape[1] != 1 + prod(grid):
        raise ValueError(f"position embedding of length {table.shape[1]} does not fit the grid {tuple(grid)} and CLS")
    patches = table[:, 1:].unflatten(1, tuple(grid)).movedim(-1, 1)
    return torch.cat([table[:, :1], resize_table(patches, tuple(wanted)).flatten(2).transpose(1, 2)], dim=1)
