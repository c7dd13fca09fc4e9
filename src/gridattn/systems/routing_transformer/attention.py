"""The attention layer as in the paper's program: local and routing heads on common projections, mixed by one matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gridattn.layers.cache import SequenceCache
from gridattn.layers.common import value_gradient_map
from gridattn.layers.kmeans import AveragedKMeans
from gridattn.ops.block_attention import block_attention
from gridattn.ops.centroids import commitment_loss, normalize_vectors
from gridattn.ops.common import check_channels, per_axis
from gridattn.ops.routing import routing_attention
from gridattn.ops.routing_step import block_attention_step, routing_attention_step


class PaperAttention(nn.Module):
    """Causal attention of a sequence: routing heads first, then local ones.

    All heads share bias-free projections; routing heads take their queries for keys, too. Local heads see their own
    block and the one before, with logits q . k / sqrt(d). Routing heads compare normalised vectors, see
    `routing_attention` with norm "layer_norm". One d x d matrix mixes the channels of every head before the output
    projection.

    Args:
        dim: channels C.
        num_heads: heads; must divide C. Channels d of a head are C / num_heads.
        local_heads: how many of the heads are local.
        window_size: positions per block of the local heads.
        num_clusters: centroids per routing head.
        cluster_size: positions that a centroid takes.
        reach: largest distance M with a learned vector of its own, per kind of heads; 0 for no relative positions.
        decay: of the averages from which the centroids follow.
        dropout: of the output.

    Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997.

    Example:
        >>> layer = PaperAttention(16, 4, local_heads=2, window_size=4, num_clusters=3, cluster_size=5)
        >>> layer(torch.randn(2, 11, 16))[0].shape
        torch.Size([2, 11, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        local_heads: int,
        window_size: int,
        num_clusters: int,
        cluster_size: int,
        reach: int = 0,
        decay: float = 0.999,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = check_channels(dim, num_heads)
        if not 0 <= local_heads <= num_heads:
            raise ValueError(f"local_heads={local_heads} is not allowed; 0 to num_heads={num_heads} are")
        self.local_heads, self.routing_heads = local_heads, num_heads - local_heads
        self.window_size = per_axis(window_size, 1, "window_size")[0]
        self.cluster_size = per_axis(cluster_size, 1, "cluster_size")[0]
        self.reach = per_axis(reach, 1, "reach", minimum=0)[0]
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        if self.routing_heads:
            self.kmeans = AveragedKMeans(self.routing_heads, num_clusters, self.head_dim, decay)
            self.routing_positions = nn.ParameterList(self._tables())
        if self.local_heads:
            self.local_positions = nn.ParameterList(self._tables())
        else:
            self.to_k.requires_grad_(False)  # there in the official state, but of no use
        self.mix = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: SequenceCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: (B, T, C).
            mask: (B, T) bool, True for real positions; others are not seen.
            cache: an empty one, to be filled for `step`.

        Returns:
            (B, T, C) and the commitment loss, a scalar.
        """
        routing, local = self._projections(x)
        if cache is not None:
            self._remember(routing, local, cache)
        heads, auxiliary = [], x.new_zeros(())
        if self.routing_heads:
            query, _, value = routing
            heads.append(self._route(query, value, mask))
            # Queries and keys each have a term, and here they are the same.
            auxiliary = 2 * commitment_loss(normalize_vectors(query, "layer_norm"), self.kmeans.means)
            if self.training:
                self.kmeans.accumulate(query)
        if self.local_heads:
            heads.append(self._attend_locally(local[0], local[1], local[2], mask))
        return self._merge(heads), auxiliary

    def step(self, x: Tensor, cache: SequenceCache) -> Tensor:
        """Attends from one more position, (B, 1, C) -> (B, 1, C); see `RoutingAttention.step`."""
        routing, local = self._projections(x)
        grown = self._remember(routing, local, cache)
        heads = []
        if self.routing_heads:
            query, value = grown[:2]
            positions = self._relative("routing_positions")
            heads.append(
                routing_attention_step(
                    query,
                    None,
                    value,
                    self.kmeans.means,
                    self.cluster_size,
                    norm="layer_norm",
                    relative=positions,
                )
            )
        if self.local_heads:
            keys, values = grown[-2:]
            positions = self._relative("local_positions")
            heads.append(block_attention_step(local[0], keys, values, self.window_size, relative=positions))
        return self._merge(heads)

    def update_centroids(self) -> None:
        """Moves the centroids by the batches since the last update."""
        if self.routing_heads:
            self.kmeans.update()

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Weights of one position, routing heads first: (B, T, C), (t,) -> (B, heads, T)."""
        (q, _, v), (local_q, local_k, local_v) = self._projections(x)
        place, maps = (int(query[0]),), []
        # Relative vectors of the values are added to the output; they do not depend on the values.
        if self.routing_heads:
            maps.append(value_gradient_map(lambda value: self._route(q, value, None), v, place))
        if self.local_heads:
            attend = lambda value: self._attend_locally(local_q, local_k, value, None)  # noqa: E731
            maps.append(value_gradient_map(attend, local_v, place))
        return torch.cat(maps, 1)

    def _route(self, query: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        per_head = None if mask is None else mask.unsqueeze(-1)
        return routing_attention(
            query,
            None,
            value,
            self.kmeans.means,
            self.cluster_size,
            norm="layer_norm",
            is_causal=True,
            query_mask=per_head,
            key_mask=per_head,
            relative=self._relative("routing_positions"),
        )

    def _attend_locally(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        positions = self._relative("local_positions")
        return block_attention(query, key, value, self.window_size, is_causal=True, mask=mask, relative=positions)

    def _projections(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys and values of the routing heads and of the local heads."""
        # Rounding to the precision of autocast would move positions from one cluster to another.
        with torch.autocast(x.device.type, enabled=False):
            query = self.to_q(x.to(self.to_q.weight.dtype))
        split = [t.unflatten(-1, (-1, self.head_dim)) for t in (query, self.to_k(x), self.to_v(x))]
        cut = self.routing_heads
        local = [t[..., cut:, :] for t in split]
        return tuple(t[..., :cut, :] for t in split), (local[0].to(local[1].dtype), *local[1:])

    def _remember(self, routing: tuple[Tensor, ...], local: tuple[Tensor, ...], cache: SequenceCache) -> list[Tensor]:
        new = {}
        if self.routing_heads:
            new |= {"query": routing[0], "value": routing[2]}
        if self.local_heads:
            new |= {"local_key": local[1], "local_value": local[2]}
        return cache.extend(**new)

    def _merge(self, heads: list[Tensor]) -> Tensor:
        return self.dropout(self.to_out(self.mix(torch.cat(heads, -2)).flatten(-2)))

    def _tables(self) -> list[nn.Parameter]:
        count = 2 if self.reach else 0
        return [nn.Parameter(0.02 * torch.randn(2 * self.reach + 1, self.head_dim)) for _ in range(count)]

    def _relative(self, name: str) -> tuple[Tensor, Tensor] | None:
        tables = tuple(getattr(self, name))
        return (tables[0], tables[1]) if tables else None
