"""Within-group and across-group attention, and the pose decoder layer that joins it with deformable attention."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.deformable import MultiScaleDeformableAttention
from gridattn.layers.global_attention import GlobalAttention
from gridattn.layers.registry import register_attention
from gridattn.ops.common import check_channels
from gridattn.ops.deformable import Shapes


@register_attention(
    "group",
    summary="attention among the members of each group, then among the groups for each member",
    source="arXiv 2308.07313",
    ranks=(2,),
)
class GroupAttention(GridAttention):
    """Within-group, then across-group self-attention on a grid (groups, members), each with residual and norm.

        x = LN(x + MHA_within(x))    among the members of one group
        x = LN(x + MHA_across(x))    among the groups, for one member

    G groups of M members cost G M^2 + M G^2 pairs in place of (G M)^2. In Group Pose a group is the set of queries of
    one person, a pose and its keypoints. The two attentions have weights of their own.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`.
        grid: the nominal grid; only its length, 2, is used.

    Source: Liu et al., Group Pose, ICCV 2023, arXiv 2308.07313.

    Example:
        >>> import torch
        >>> GroupAttention(32, num_heads=4)(torch.randn(2, 10, 18, 32)).shape
        torch.Size([2, 10, 18, 32])
    """

    def __init__(self, dim: int, num_heads: int = 4, *, grid: Sequence[int] = (14, 14)) -> None:
        if len(grid) != 2:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} axes; 2, groups and members, are allowed")
        super().__init__(dim, rank=2)
        self.within = GlobalAttention(dim, num_heads, grid=grid[1:])
        self.within_norm = nn.LayerNorm(dim)
        self.across = GlobalAttention(dim, num_heads, grid=grid[:1])
        self.across_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, groups, members, C) -> (B, groups, members, C)."""
        self.check_input(x)
        batch = len(x)
        groups = self.within(rearrange(x, "b g m c -> (b g) m c"))
        x = self.within_norm(x + rearrange(groups, "(b g) m c -> b g m c", b=batch, g=x.shape[1]))
        members = self.across(rearrange(x, "b g m c -> (b m) g c"))
        return self.across_norm(x + rearrange(members, "(b m) g c -> b g m c", b=batch, m=x.shape[2]))

    def macs(self, grid: Sequence[int]) -> int:
        groups, members = grid
        return groups * self.within.macs((members,)) + members * self.across.macs((groups,))


class GroupDecoderLayer(nn.Module):
    """A decoder layer of Group Pose: group attention among the queries, deformable attention to the image, FFN.

        x = x + code;  x = Group(x)
        x = x + code;  x = LN(x + MSDA(x, references, memory));  x = LN(x + W_2 ReLU(W_1 x))

    The code of a keypoint query's position goes into the stream itself, so that values and residual carry it too.
    Slot 0 of a group, the query of the whole pose, has none.

    Args:
        dim: channels C.
        num_heads: heads of all three attentions; must divide `dim`.
        hidden: channels inside the feed-forward.
        num_levels: levels of the image pyramid.
        num_points: points that a query reads on each level with each head.

    Source: Liu et al., Group Pose, ICCV 2023, arXiv 2308.07313.

    Example:
        >>> import torch
        >>> layer = GroupDecoderLayer(32, num_heads=4, hidden=64, num_levels=1)
        >>> x, code, reference = torch.randn(1, 3, 6, 32), torch.randn(1, 3, 5, 32), torch.rand(1, 3, 6, 1, 2)
        >>> layer(x, code, reference, torch.randn(1, 56, 32), [(7, 8)]).shape
        torch.Size([1, 3, 6, 32])
    """

    def __init__(
        self, dim: int = 256, num_heads: int = 8, hidden: int = 2048, num_levels: int = 4, num_points: int = 4
    ) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        self.group = GroupAttention(dim, num_heads)
        self.cross_attn = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        code: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        """One layer of the decoder.

        Args:
            x: (B, N, K + 1, C), N groups; slot 0 is the pose, the others its K keypoints.
            code: (B, N, K, C), position codes of the keypoint queries.
            reference: (B, N, K + 1, levels, 2), x then y in [0, 1] of each level.
            memory: (B, S, C), see `MultiScaleDeformableAttention`.
            shapes: (height, width) of each level.
            padding: (B, S) bool, True at padded positions.

        Returns:
            (B, N, K + 1, C).
        """
        code = F.pad(code, (0, 0, 1, 0))
        x = self.group(x + code) + code
        read = self.cross_attn(x.flatten(1, 2), reference.flatten(1, 2), memory, shapes, padding)
        x = self.norm1(x + read.view_as(x))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


_OFFICIAL = {
    "within_attn.in_proj_": "group.within.qkv.",
    "within_attn.out_proj.": "group.within.proj.",
    "across_attn.in_proj_": "group.across.qkv.",
    "across_attn.out_proj.": "group.across.proj.",
    "within_norm.": "group.within_norm.",
    "across_norm.": "group.across_norm.",
}


def group_decoder_state_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the official keys of one decoder layer to those of `GroupDecoderLayer`."""
    renamed = {}
    for key, tensor in state.items():
        prefix = next((p for p in _OFFICIAL if key.startswith(p)), "")
        renamed[_OFFICIAL.get(prefix, "") + key.removeprefix(prefix)] = tensor
    return renamed
