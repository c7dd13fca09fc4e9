"""Selective scans over grids: every position is reached along paths in all directions, at linear cost."""

import math
from collections.abc import Mapping, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridattn.layers.common import GridAttention
from gridattn.layers.mlp import Mlp
from gridattn.layers.registry import register_attention
from gridattn.layers.window import WindowAttention
from gridattn.ops.common import check_channels, check_choice, per_axis
from gridattn.ops.large_kernel import depthwise_conv, depthwise_conv_macs
from gridattn.ops.scan_paths import KINDS, inverse_paths, scan_paths
from gridattn.ops.selective_scan import scan_tokens


@register_attention(
    "selective_scan",
    summary="state space scans (S6) along snakes over the grid, two for each axis, with a gate",
    source="arXiv 2408.02615",
    linear_cost=True,
    paths="continuous",
)
@register_attention(
    "selective_scan_cross",
    summary="state space scans (S6) along raster lines, two for each axis, with a gate",
    source="arXiv 2401.10166",
    linear_cost=True,
    paths="cross",
)
class SelectiveScan(GridAttention):
    """The two-dimensional Mamba mixer (SS2D), on grids of 1 to 3 axes.

        x, z = in_proj(x);  x = SiLU(conv(x));  y = sum over paths of S6(x along the path);
        out_proj(LN(y) * SiLU(z))

    Every path has its own projection to step size, B and C, and its own A and D (see `selective_scan`).

    Args:
        dim: channels C.
        num_heads: not used; the mechanism has no heads.
        grid: the nominal grid; only its length, the rank, is used.
        paths: "continuous", snakes whose successive positions are neighbours, or "cross", raster lines.
        state_dim: states N per channel.
        expansion: inner channels over C.
        step_rank: rank of the map to step sizes; ceil(C / 16) when None.
        kernel_size: of the depth-wise convolution.
        conv_bias: bias in the convolution.

    Raises:
        ValueError: a size below 1, unknown paths.

    Sources: Liu et al., VMamba, arXiv 2401.10166; Fu et al., LaMamba-Diff, arXiv 2408.02615.

    Example:
        >>> SelectiveScan(32)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        paths: str = "continuous",
        state_dim: int = 1,
        expansion: float = 2.0,
        step_rank: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        conv_bias: bool = False,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, 1)
        check_choice("paths", paths, KINDS)
        self.paths = paths
        self.step_rank = per_axis(-(-dim // 16) if step_rank is None else step_rank, 1, "step_rank")[0]
        self.state_dim = per_axis(state_dim, 1, "state_dim")[0]
        kernel = per_axis(kernel_size, self.rank, "kernel_size")
        inner, count = int(expansion * dim), 2 * self.rank
        if inner < 1:
            raise ValueError(f"expansion={expansion} leaves no channel of dim={dim}; at least one is needed")

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(_uniform((inner, 1, *kernel), prod(kernel) ** -0.5))
        self.conv_bias = nn.Parameter(_uniform((inner,), prod(kernel) ** -0.5)) if conv_bias else None
        rows = self.step_rank + 2 * self.state_dim
        self.x_proj_weight = nn.Parameter(_uniform((count, rows, inner), inner**-0.5))
        self.dt_projs_weight = nn.Parameter(_uniform((count, inner, self.step_rank), self.step_rank**-0.5))
        # softplus(dt_projs_bias) starts between 0.001 and 0.1, spread evenly on a logarithmic scale.
        step = torch.empty(count, inner).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_logs = nn.Parameter(torch.arange(1.0, self.state_dim + 1).log().repeat(count * inner, 1))
        self.Ds = nn.Parameter(torch.ones(count * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(depthwise_conv(x, self.conv_weight, self.conv_bias))
        y = self.out_norm(self._scan(x)).to(z.dtype)
        return self.out_proj(y * F.silu(z))

    def _scan(self, x: Tensor) -> Tensor:
        """Sum over the paths of what the scans give, (B, *grid, inner) -> (B, *grid, inner), float32 or wider."""
        grid = x.shape[1:-1]
        paths = scan_paths(grid, self.paths, x.device)
        count = paths.shape[0]
        tokens = x.flatten(1, -2).transpose(0, 1)
        u = tokens.index_select(0, paths.T.flatten()).unflatten(0, (-1, count))  # (N, paths, B, inner)
        projected = torch.einsum("lkbd,kcd->lkbc", u, self.x_proj_weight)
        step, to_state, to_output = projected.split([self.step_rank, self.state_dim, self.state_dim], -1)
        # Laid out along the scan, which reads it in this order.
        step = torch.einsum("lkbr,kdr->lkbd", step, self.dt_projs_weight).contiguous()
        step = F.softplus(step.to(self.dt_projs_bias.dtype) + self.dt_projs_bias.unsqueeze(1))
        decay = -self.A_logs.exp().unflatten(0, (count, 1, -1))
        y = scan_tokens(u, step, decay, to_state, to_output) + self.Ds.view(count, 1, -1) * u
        at_home = inverse_paths(paths).T * count + torch.arange(count, device=x.device)
        y = y.flatten(0, 1).index_select(0, at_home.flatten()).unflatten(0, (-1, count)).sum(1)
        return y.transpose(0, 1).unflatten(1, grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Projections and convolution; the recurrence itself is elementwise."""
        n, inner = prod(grid), self.out_proj.in_features
        per_path = inner * (2 * self.step_rank + 2 * self.state_dim)
        dense = 3 * inner * self.dim + 2 * self.rank * per_path
        return n * dense + depthwise_conv_macs(self.conv_weight, grid)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, both inner halves, and for all paths the tokens, steps, decays and states."""
        inner = self.out_proj.in_features
        per_position = 2 * self.dim + 3 * inner + 2 * self.rank * inner * (3 + 3 * self.state_dim)
        return bytes_per_element * prod(grid) * per_position


@register_attention(
    "scan_window",
    summary="selective scans over the whole grid, then attention inside blocks of neighbours",
    source="arXiv 2408.02615",
    linear_cost=True,
)
class ScanWindowAttention(GridAttention):
    """The token mixer of LaMamba without its condition: x = x + scan(LN(x)), then x + window_attention(LN(x)).

    Args:
        dim: channels C.
        num_heads: heads of the window attention; must divide `dim`.
        grid: the nominal grid; only its length, the rank, is used.
        window_size: positions per window, one int or one per axis.
        shifted: windows start half a window later.
        bias: learned relative position bias of the windows.
        qkv_bias: bias in the query/key/value projection of the windows.
        paths: see `SelectiveScan`.
        state_dim: see `SelectiveScan`.
        expansion: see `SelectiveScan`.

    Source: Fu et al., LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba,
    arXiv 2408.02615.

    Example:
        >>> ScanWindowAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        window_size: int | Sequence[int] = 8,
        shifted: bool = False,
        bias: bool = True,
        qkv_bias: bool = True,
        paths: str = "continuous",
        state_dim: int = 1,
        expansion: float = 2.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        self.window = WindowAttention(
            dim, num_heads, grid=grid, window_size=window_size, shifted=shifted, bias=bias, qkv_bias=qkv_bias
        )
        self.scan = SelectiveScan(dim, grid=grid, paths=paths, state_dim=state_dim, expansion=expansion)
        self.scan_norm = nn.LayerNorm(dim)
        self.window_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        self.check_input(x)
        x = x + self.scan(self.scan_norm(x))
        return x + self.window(self.window_norm(x))

    def macs(self, grid: Sequence[int]) -> int:
        return self.scan.macs(grid) + self.window.macs(grid)

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        return max(self.scan.memory(grid, bytes_per_element), self.window.memory(grid, bytes_per_element))


class LaMambaBlock(nn.Module):
    """Scan, window attention and feed-forward, each shifted, scaled and gated by a condition.

    With s, k, g of each branch = linear(SiLU(condition')), condition' = condition_projection(condition):

        x = x + g * branch(LN(x) * (1 + k) + s)      for the scan, then the windows, then the feed-forward.

    The linear map starts at zero, so a new block is the identity.

    Args:
        scan: a layer (B, *grid, C) -> (B, *grid, C).
        window: the layer of the second branch.
        condition_dim: channels of the condition.
        mlp_ratio: hidden channels of the feed-forward over C.
        project_condition: a linear map of the condition to C channels; None has one where `condition_dim` is not C.

    Raises:
        ValueError: layers of different width, or a condition of another width without projection.

    Source: Fu et al., LaMamba-Diff, arXiv 2408.02615.

    Example:
        >>> block = LaMambaBlock(SelectiveScan(16), WindowAttention(16, 2), condition_dim=20)
        >>> block(torch.randn(2, 8, 8, 16), torch.randn(2, 20)).shape
        torch.Size([2, 8, 8, 16])
    """

    def __init__(
        self,
        scan: GridAttention,
        window: GridAttention,
        condition_dim: int,
        *,
        mlp_ratio: float = 4.0,
        project_condition: bool | None = None,
    ) -> None:
        super().__init__()
        dim = scan.dim
        if window.dim != dim:
            raise ValueError(f"window has dim={window.dim} but scan has dim={dim}; one width is allowed")
        project = condition_dim != dim if project_condition is None else project_condition
        if not project and condition_dim != dim:
            raise ValueError(f"condition_dim={condition_dim} needs project_condition=True; only dim={dim} does not")
        self.condition_projection = nn.Linear(condition_dim, dim) if project else nn.Identity()
        self.modulation = nn.Linear(dim, 9 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.scan_norm = nn.LayerNorm(dim)
        self.scan = scan
        self.window_norm = nn.LayerNorm(dim)
        self.window = window
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, *grid, C) and (B, condition_dim) -> (B, *grid, C)."""
        modulation = self.modulation(F.silu(self.condition_projection(condition)))
        modulation = modulation.view(len(x), *[1] * (x.ndim - 2), -1)
        vectors = modulation.chunk(9, -1)
        branches = ((self.scan_norm, self.scan), (self.window_norm, self.window), (self.mlp_norm, self.mlp))
        for (norm, branch), shift, scale, gate in zip(branches, vectors[0::3], vectors[1::3], vectors[2::3]):
            x = x + gate * branch(norm(x) * (1 + scale) + shift)
        return x

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-accumulates for one sample on `grid`."""
        dim, hidden = self.scan.dim, self.mlp.fc1.out_features
        project = self.condition_projection
        condition = dim * 9 * dim + (project.weight.numel() if isinstance(project, nn.Linear) else 0)
        return self.scan.macs(grid) + self.window.macs(grid) + 2 * prod(grid) * dim * hidden + condition


def _uniform(shape: Sequence[int], bound: float) -> Tensor:
    return torch.empty(*shape).uniform_(-bound, bound)


_SCAN_NAMES = {"conv2d.weight": "conv_weight", "conv2d.bias": "conv_bias"}
_BLOCK_NAMES = {
    "op": "scan",
    "norm": "scan_norm",
    "norm_swin": "window_norm",
    "attn": "window",
    "norm2": "mlp_norm",
    "adaLN_modulation": "modulation",
}


def convert_official_scan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the authors' SS2D -> state of `SelectiveScan`."""
    return {_SCAN_NAMES.get(name, name): tensor for name, tensor in state.items()}


def convert_official_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of one of the authors' conditioned blocks -> state of `LaMambaBlock`, without tables that are computed.

    Their table of position biases is indexed by query minus key, one row per offset; ours by key minus query.
    """
    converted = {}
    for name, tensor in state.items():
        room, _, rest = name.partition(".")
        if name == "attn_mask" or rest == "relative_position_index":
            continue
        if rest == "relative_position_bias_table":
            side = math.isqrt(tensor.shape[0])
            converted["window.relative_position_bias"] = tensor.T.reshape(-1, side, side).flip(1, 2)
            continue
        rest = _SCAN_NAMES.get(rest, rest) if room == "op" else rest.removeprefix("1.")
        converted[f"{_BLOCK_NAMES.get(room, room)}.{rest}"] = tensor
    return converted
