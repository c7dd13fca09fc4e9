"""Attention with fixed distance biases, within one grid (2D-ALiBi) and from one grid to another (X-ALiBi), and their
encoder."""

from collections.abc import Sequence
from math import prod

from einops import rearrange
from torch import Tensor, nn

from gridattn.layers.common import GridAttention, split_heads, value_gradient_map
from gridattn.layers.dropout import Dropout
from gridattn.layers.registry import register_attention
from gridattn.ops.alibi import alibi_attention, alibi_bias, alibi_slopes, grid_positions
from gridattn.ops.common import check_channels, check_probability


@register_attention(
    "alibi",
    summary="dense self-attention whose logits fall linearly with the distance on the grid",
    source="arXiv 2311.00566",
)
class AlibiAttention(GridAttention):
    """Self-attention with 2D-ALiBi: softmax(Q K^T / sqrt(d) - m_h ||p_i - p_j||) V on a grid of rank 1 to 3.

    It has no position table: a layer trained on one grid runs on any other.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim`. Head h has the fixed slope m_h of `ops.alibi.alibi_slopes`.
        grid: the nominal grid; only its length, the rank, is used.
        qkv_bias: bias in the query/key/value projection; the authors have none.
        attention_dropout: dropout probability of the attention weights.
        projection_dropout: dropout probability of the output.

    Source: Fuller et al., CROMA, NeurIPS 2023, arXiv 2311.00566.

    Example:
        >>> import torch
        >>> AlibiAttention(32, num_heads=4)(torch.randn(2, 5, 9, 32)).shape
        torch.Size([2, 5, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        check_probability("projection_dropout", projection_dropout)
        self.num_heads = num_heads
        self.slopes = alibi_slopes(num_heads)
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = Dropout(projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        grid = self.check_input(x)
        positions = grid_positions(grid, device=x.device)
        bias = alibi_bias(positions, positions, self.slopes)
        return self.attend_tokens(x.flatten(1, -2), bias).view(x.shape)

    def attend_tokens(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attention among any tokens: x (B, N, C), bias (heads, N, N) or (B, heads, N, N) -> (B, N, C)."""
        query, key, value = self._project(x)
        out = alibi_attention(query, key, value, bias, self.attention_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), 3, self.num_heads)

    def macs(self, grid: Sequence[int]) -> int:
        n = prod(grid)
        return n * 4 * self.dim**2 + 2 * n**2 * self.dim

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        return super().memory(grid, bytes_per_element) + self.num_heads * prod(grid) ** 2 * bytes_per_element

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        position = self.check_query(x, query)
        grid = tuple(x.shape[1:-1])
        everywhere = grid_positions(grid, device=x.device)
        bias = alibi_bias(everywhere, everywhere, self.slopes)
        q, k, v = self._project(x)

        def attend(value: Tensor) -> Tensor:
            out = alibi_attention(q.flatten(1, -3), k.flatten(1, -3), value.flatten(1, -3), bias)
            return out.view(value.shape)

        return value_gradient_map(attend, v, position)


class CrossAlibiAttention(nn.Module):
    """Cross-attention with X-ALiBi: queries of one grid look at another grid over the same area; distance 0 is the
    same place.

    Args:
        dim: channels of both grids.
        num_heads: heads; must divide `dim`.
        qkv_bias: bias in the query, key and value projections; the authors have none.
        attention_dropout: dropout probability of the attention weights.

    Source: Fuller et al., CROMA, NeurIPS 2023, arXiv 2311.00566.

    Example:
        >>> import torch
        >>> CrossAlibiAttention(32)(torch.randn(1, 5, 5, 32), torch.randn(1, 10, 10, 32)).shape
        torch.Size([1, 5, 5, 32])
    """

    def __init__(self, dim: int, num_heads: int = 4, *, qkv_bias: bool = False, attention_dropout: float = 0.0) -> None:
        super().__init__()
        check_channels(dim, num_heads)
        check_probability("attention_dropout", attention_dropout)
        self.num_heads = num_heads
        self.slopes = alibi_slopes(num_heads)
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, *grid, C), context (B, *other grid of the same rank, C) -> (B, *grid, C). Distances are in cells of x.

        Raises:
            ValueError: grids of different rank, or another batch size or channel count.
        """
        if context.ndim != x.ndim or (context.shape[0], context.shape[-1]) != (x.shape[0], x.shape[-1]):
            raise ValueError(
                f"context has shape {tuple(context.shape)} but x has {tuple(x.shape)}; "
                "equal batch, rank and channels are allowed"
            )
        grid, other = tuple(x.shape[1:-1]), tuple(context.shape[1:-1])
        bias = alibi_bias(
            grid_positions(grid, device=x.device), grid_positions(other, grid, device=x.device), self.slopes
        )
        return self.attend_tokens(x.flatten(1, -2), context.flatten(1, -2), bias).view(x.shape)

    def attend_tokens(self, x: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """x (B, Nq, C), context (B, Nk, C), bias (heads, Nq, Nk) or (B, heads, Nq, Nk) -> (B, Nq, C)."""
        query, key, value = (
            rearrange(project(tokens), "b n (h d) -> b n h d", h=self.num_heads)
            for project, tokens in ((self.query, x), (self.key, context), (self.value, context))
        )
        out = alibi_attention(query, key, value, bias, self.attention_dropout if self.training else 0.0)
        return self.proj(out.flatten(-2))


class AlibiBlock(nn.Module):
    """One transformer layer: x + SA(LN x), then x + CA(LN x, LN context) where it crosses, then x + FFN(LN x).

    Args:
        dim: channels.
        num_heads: heads.
        cross: whether the layer attends to a context.
        mlp_ratio: hidden width of the FFN over `dim`.
    """

    def __init__(self, dim: int, num_heads: int, *, cross: bool = False, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = AlibiAttention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.cross = CrossAlibiAttention(dim, num_heads) if cross else None
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, x: Tensor, bias: Tensor, context: Tensor | None = None, cross_bias: Tensor | None = None
    ) -> Tensor:
        """x (B, N, C), context (B, M, C) -> (B, N, C).

        Args:
            x: tokens.
            bias: (heads, N, N) or (B, heads, N, N).
            context: tokens that a crossing layer attends to.
            cross_bias: (heads, N, M) or (B, heads, N, M).
        """
        x = x + self.attention.attend_tokens(self.attention_norm(x), bias)
        if self.cross is not None and self.cross_norm is not None:
            if context is None or cross_bias is None:
                raise ValueError("context and cross_bias are needed; this layer was built with cross=True")
            x = x + self.cross.attend_tokens(self.cross_norm(x), self.cross_norm(context), cross_bias)
        return x + self.mlp(self.mlp_norm(x))


class AlibiEncoder(nn.Module):
    """A stack of `AlibiBlock`s with a final LayerNorm; with `cross` the cross encoder of CROMA.

    Args:
        dim: channels.
        depth: number of layers.
        num_heads: heads.
        cross: whether its layers attend to a context.
        mlp_ratio: hidden width of the FFNs over `dim`.

    Source: Fuller et al., CROMA, NeurIPS 2023, arXiv 2311.00566.

    Example:
        >>> import torch
        >>> positions = grid_positions((3, 3))
        >>> bias = alibi_bias(positions, positions, alibi_slopes(4))
        >>> AlibiEncoder(32, depth=2, num_heads=4)(torch.randn(1, 9, 32), bias).shape
        torch.Size([1, 9, 32])
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, cross: bool = False, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AlibiBlock(dim, num_heads, cross=cross, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, bias: Tensor, context: Tensor | None = None, cross_bias: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C); arguments as in `AlibiBlock.forward`."""
        for layer in self.layers:
            x = layer(x, bias, context, cross_bias)
        return self.norm(x)


_OFFICIAL_ATTENTION = {
    "input_norm": "attention_norm",
    "create_qkv": "attention.qkv",
    "to_qkv": "attention.qkv",
    "out": "attention.proj",
    "to_out": "attention.proj",
}
_OFFICIAL_CROSS = {
    "input_norm": "cross_norm",
    "create_q": "cross.query",
    "create_k": "cross.key",
    "create_v": "cross.value",
    "to_q": "cross.query",
    "to_k": "cross.key",
    "to_v": "cross.value",
    "to_out": "cross.proj",
}
_OFFICIAL_MLP = {"input_norm": "mlp_norm", "net.0": "mlp.0", "net.2": "mlp.2", "net.3": "mlp.2"}


def load_official_encoder(state: dict[str, Tensor], *, cross: bool) -> dict[str, Tensor]:
    """Renames the state dict of an official encoder (pre-training or released classes) to that of `AlibiEncoder`.

    Args:
        state: keys `layers.{i}.{j}...` and `norm_out...`.
        cross: whether it is the cross encoder, whose layers have three parts instead of two.

    Raises:
        ValueError: a key that the layout does not have.
    """
    parts = [_OFFICIAL_ATTENTION, _OFFICIAL_CROSS, _OFFICIAL_MLP] if cross else [_OFFICIAL_ATTENTION, _OFFICIAL_MLP]
    renamed = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if module == "norm_out":
            renamed[f"norm.{leaf}"] = tensor
            continue
        head, _, rest = module.partition(".")
        layer, _, rest = rest.partition(".")
        part, _, name = rest.partition(".")
        if head != "layers" or not part.isdigit() or int(part) >= len(parts) or name not in parts[int(part)]:
            raise ValueError(f"key {key!r} is not one of an official {'cross ' if cross else ''}encoder")
        renamed[f"layers.{layer}.{parts[int(part)][name]}.{leaf}"] = tensor
    return renamed
