"""Agent attention without training: a diffusion transformer block whose self-attention runs on merged tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gridattn.ops.agent import agent_attention
from gridattn.ops.common import check_channels, check_probability, per_axis
from gridattn.ops.token_merging import choose_destinations, match_tokens


@dataclass(frozen=True)
class AgentMerging:
    """How the self-attention of a block saves tokens.

    Attributes:
        cell: positions per cell and axis; one token of each cell can take in others.
        ratio: share of all tokens merged before attention; at most all but one per cell. 0 merges nothing.
        agent_ratio: share merged to make agents. They are used only where they are fewer than half of the tokens left.
        broadcast_exponent: k2; the factor of the broadcasting product is head_dim ** (-k2 / 2).
        shortcut: share of the values added to the result, in place of the convolution that would need training.
        random: draws the token of each cell, in place of its first.

    Raises:
        ValueError: a ratio outside [0, 1), a cell below 1.

    Source: AgentSD, arXiv 2312.08874.
    """

    cell: int | Sequence[int] = 4
    ratio: float = 0.4
    agent_ratio: float = 0.95
    broadcast_exponent: float = 0.3
    shortcut: float = 0.075
    random: bool = True

    def __post_init__(self) -> None:
        per_axis(self.cell, len(self.cell) if isinstance(self.cell, Sequence) else 1, "cell")
        check_probability("ratio", self.ratio)
        check_probability("agent_ratio", self.agent_ratio)

    def counts(self, grid: Sequence[int]) -> tuple[int, int]:
        """Tokens left after merging, and agents (0 where none are used), on `grid`.

        Example:
            >>> AgentMerging(cell=4, ratio=0.4, agent_ratio=0.95).counts((64, 64))
            (2458, 256)
            >>> AgentMerging(cell=2, ratio=0.4, agent_ratio=0.5).counts((64, 64))
            (2458, 0)
        """
        total = prod(grid)
        sources = total - prod(n // c for n, c in zip(grid, per_axis(self.cell, len(grid), "cell")))
        left, agents = (total - min(sources, int(total * share)) for share in (self.ratio, self.agent_ratio))
        return left, agents if self.ratio > 0 and 2 * agents < left else 0


def agent_schedule(step: int, steps: int = 50, ratio: float = 0.4) -> AgentMerging:
    """What the authors use at a step of sampling: agents during the first two fifths, plain merging after.

    Example:
        >>> [agent_schedule(step).cell for step in (0, 19, 20, 49)]
        [4, 4, 2, 2]
    """
    if not 0 <= step < steps:
        raise ValueError(f"step={step} is not allowed; 0 to {steps - 1} are the steps")
    early = 5 * step < 2 * steps
    return AgentMerging(cell=4 if early else 2, ratio=ratio, agent_ratio=0.95 if early else 0.5)


class DiffusionAttention(nn.Module):
    """Attention as in latent diffusion models, to the tokens themselves or to a context, optionally through agents.

    Args:
        dim: channels of the tokens.
        num_heads: heads.
        head_dim: channels per head.
        context_dim: channels of the context; `dim` when None.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        inner, context = num_heads * head_dim, dim if context_dim is None else context_dim
        check_channels(inner, num_heads)
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context, inner, bias=False)
        self.to_v = nn.Linear(context, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        agents: Tensor | None = None,
        settings: AgentMerging | None = None,
    ) -> Tensor:
        """x (B, N, C), context (B, M, C') or agents (B, n, C) with their settings -> (B, N, C)."""
        context = x if context is None else context
        query, key, value = self._heads(self.to_q(x)), self._heads(self.to_k(context)), self._heads(self.to_v(context))
        if agents is None or settings is None:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            scale = query.shape[-1] ** (-0.5 * settings.broadcast_exponent)
            gathered = agent_attention(query, key, value, self._heads(self.to_q(agents)), broadcast_scale=scale)
            heads = gathered + settings.shortcut * value
        return self.to_out(heads.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b n h d", h=self.num_heads)


class GatedMlp(nn.Module):
    """fc2(a * GELU(b)) with a, b = fc1(x) (GEGLU), hidden width 4 C.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 8 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.gelu(gate))


class AgentDiffusionBlock(nn.Module):
    """The transformer block of latent diffusion models, with agents in its self-attention that need no training.

    x = x + self_attention(LN1(x)), x = x + cross_attention(LN2(x), context), x = x + mlp(LN3(x)). While `merging` is
    set, the self-attention takes merged tokens and, where few enough, agents that are merged further:
    O = softmax(s2 Q A^T) softmax(s A K^T) V + shortcut V with A = W_q agents. With `merging = None` the block is the
    unchanged one.

    Args:
        dim: channels C.
        num_heads: heads.
        head_dim: channels per head.
        context_dim: channels of the context.
        merging: see `AgentMerging`; may be set anew at every step.

    Source: AgentSD, arXiv 2312.08874.

    Example:
        >>> block = AgentDiffusionBlock(32, num_heads=4, head_dim=8, context_dim=20, merging=agent_schedule(step=0))
        >>> block(torch.randn(2, 8, 12, 32), torch.randn(2, 5, 20)).shape
        torch.Size([2, 8, 12, 32])
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, context_dim: int, merging: AgentMerging | None = None
    ) -> None:
        super().__init__()
        self.merging = merging
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = DiffusionAttention(dim, num_heads, head_dim)
        self.cross_attention = DiffusionAttention(dim, num_heads, head_dim, context_dim)
        self.mlp = GatedMlp(dim)

    def forward(self, x: Tensor, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (B, *grid, C), context (B, M, C') -> (B, *grid, C); `generator` draws the cells' tokens."""
        grid, tokens = x.shape[1:-1], x.flatten(1, -2)
        tokens = tokens + self._attend_to_self(tokens, grid, generator)
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        tokens = tokens + self.mlp(self.norm3(tokens))
        return tokens.view(x.shape)

    def _attend_to_self(self, tokens: Tensor, grid: Sequence[int], generator: torch.Generator | None) -> Tensor:
        settings, normed = self.merging, self.norm1(tokens)
        if settings is None or settings.ratio == 0:
            return self.self_attention(normed)
        left, agents = settings.counts(grid)
        destinations = choose_destinations(grid, settings.cell, random=settings.random, generator=generator)
        matching = match_tokens(tokens, destinations)
        merged = matching.merge(normed, tokens.shape[1] - left)
        pooled = matching.merge(normed, tokens.shape[1] - agents) if agents else None
        attended = self.self_attention(merged, agents=pooled, settings=settings)
        return matching.unmerge(attended, tokens.shape[1] - left)


def convert_official_block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a latent diffusion `BasicTransformerBlock` -> the names of `AgentDiffusionBlock`.

    Example:
        >>> list(convert_official_block({"attn1.to_q.weight": torch.ones(1), "ff.net.2.bias": torch.ones(1)}))
        ['self_attention.to_q.weight', 'mlp.fc2.bias']
    """
    renamed = {"attn1.": "self_attention.", "attn2.": "cross_attention.", "ff.net.0.proj.": "mlp.fc1."}
    renamed |= {"ff.net.2.": "mlp.fc2."}
    ours = {}
    for name, tensor in state.items():
        prefix = next((p for p in renamed if name.startswith(p)), "")
        ours[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return ours
