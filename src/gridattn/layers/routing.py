"""Routing attention: some heads look around, the others attend among positions of similar content anywhere."""

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn

from gridattn.layers.cache import SequenceCache
from gridattn.layers.common import GridAttention, value_gradient_map
from gridattn.layers.kmeans import AveragedKMeans, OnlineKMeans
from gridattn.layers.registry import register_attention
from gridattn.ops.block_attention import block_attention, block_attention_pairs
from gridattn.ops.centroids import NORMS, commitment_loss, normalize_vectors
from gridattn.ops.common import check_channels, check_choice, per_axis
from gridattn.ops.rotary import rotary_frequencies, rotate
from gridattn.ops.routing import routing_attention
from gridattn.ops.routing_step import block_attention_step, routing_attention_step


@register_attention(
    "routing",
    summary="attention inside clusters of similar positions found by online k-means, beside heads with local blocks",
    source="arXiv 2003.05997",
    causal=True,
)
class RoutingAttention(GridAttention):
    """Local heads (`block_attention`) and routing heads (`routing_attention`), concatenated in this order.

    The centroids move in training: after every forward pass, or with `defer_update` when `update_centroids` is called,
    so that the micro-batches of one optimiser step count as one. The first training pass places them on its data. In
    eval mode they never change.

    Args:
        dim: channels C.
        num_heads: heads; must divide `dim` unless `head_dim` is given.
        grid: the nominal grid; it gives the default of `num_clusters`.
        local_heads: how many of the heads are local; half when None.
        window_size: positions per block of the local heads and axis.
        num_clusters: centroids K per routing head; the square root of the nominal number of positions when None.
        cluster_size: positions that a centroid takes; the number of positions over K, rounded up, when None.
        is_causal: a position sees itself and those before it in row-major order. Which positions a centroid takes is
            still decided by looking at all.
        shared_qk: routing heads have no keys of their own; `is_causal` when None.
        norm: "unit": centroids of unit vectors and scaled logits. "layer_norm": the paper's form, see
            `routing_attention` and `AveragedKMeans`.
        head_dim: channels per head; C / num_heads when None.
        num_memory: learned keys and values per cluster; at least one for causal heads with keys of their own.
        rotary: rotates queries and keys by their row-major position, in routing heads values too; on grids of one axis
            only when None.
        bias: routing heads add learned vectors by the distance between places inside a cluster to keys and values.
        decay: of the centroids.
        defer_update: see above.

    Raises:
        ValueError: sizes that do not fit, an unknown norm, `bias` together with memory.

    Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, arXiv 2003.05997.

    Example:
        >>> RoutingAttention(32, num_heads=4)(torch.randn(2, 7, 9, 32)).shape
        torch.Size([2, 7, 9, 32])
    """

    exact_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        grid: Sequence[int] = (14, 14),
        local_heads: int | None = None,
        window_size: int | Sequence[int] = 4,
        num_clusters: int | None = None,
        cluster_size: int | None = None,
        is_causal: bool = False,
        shared_qk: bool | None = None,
        norm: str = "unit",
        head_dim: int | None = None,
        num_memory: int = 0,
        rotary: bool | None = None,
        bias: bool = False,
        decay: float = 0.999,
        defer_update: bool = False,
    ) -> None:
        super().__init__(dim, rank=len(grid))
        check_choice("norm", norm, NORMS)
        width = check_channels(dim, num_heads if head_dim is None else 1)
        self.head_dim = width if head_dim is None else per_axis(head_dim, 1, "head_dim")[0]
        self.local_heads = num_heads // 2 if local_heads is None else local_heads
        self.routing_heads = num_heads - self.local_heads
        if not 0 <= self.local_heads <= num_heads:
            raise ValueError(f"local_heads={local_heads} is not allowed; 0 to num_heads={num_heads} are")
        clusters = max(1, isqrt(prod(grid))) if num_clusters is None else num_clusters
        self.num_clusters = per_axis(clusters, 1, "num_clusters")[0]
        self.cluster_size = None if cluster_size is None else per_axis(cluster_size, 1, "cluster_size")[0]
        self.window_size = per_axis(window_size, self.rank, "window_size")
        self.is_causal = is_causal
        self.shared_qk = is_causal if shared_qk is None else shared_qk
        self.norm = norm
        self.rotary = self.rank == 1 if rotary is None else rotary
        if self.rotary:
            rotary_frequencies(self.head_dim)
        self.defer_update = defer_update

        inner = self.routing_heads * self.head_dim
        if self.local_heads:
            self.local_to_qkv = nn.Linear(dim, 3 * self.local_heads * self.head_dim)
        if self.routing_heads:
            self.to_q = nn.Linear(dim, inner, bias=False)
            self.to_k = None if self.shared_qk else nn.Linear(dim, inner, bias=False)
            self.to_v = nn.Linear(dim, inner, bias=False)
            kmeans = OnlineKMeans if norm == "unit" else AveragedKMeans
            self.kmeans = kmeans(self.routing_heads, self.num_clusters, self.head_dim, decay)
            needed = 1 if is_causal and not self.shared_qk else 0
            memories = max(needed, per_axis(num_memory, 1, "num_memory", minimum=0)[0])
            shape = (self.routing_heads, self.num_clusters, memories, self.head_dim)
            if bias and memories:
                raise ValueError(f"bias=True is not allowed with memory, of which there are {memories} per cluster")
            self.mem_key = nn.Parameter(torch.randn(shape)) if memories else None
            self.mem_value = nn.Parameter(torch.randn(shape)) if memories else None
            # Places inside a cluster are at most cluster_size - 1 apart; tables of the nominal size are clipped beyond.
            reach = self._cluster_size(prod(grid))
            tables = [nn.Parameter(0.02 * torch.randn(2 * reach + 1, self.head_dim)) for _ in range(2)] if bias else []
            self.relative_positions = nn.ParameterList(tables)
        self.to_out = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        return_auxiliary: bool = False,
        cache: SequenceCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: (B, *grid, C).
            mask: (B, *grid) bool, True for real positions; masked ones are not seen, and their own output means
                nothing.
            return_auxiliary: also return the commitment loss, to be added to the task's with a small factor (1e-4).
            cache: an empty one, to be filled for `step`.

        Returns:
            (B, *grid, C), or that and a scalar.
        """
        self.check_input(x)
        heads, auxiliary = [], x.new_zeros(())
        if self.local_heads:
            query, key, value = self._local_projections(x)
            if cache is not None:
                cache.extend(local_key=key, local_value=value)
            heads.append(self._attend_locally(query, key, value, mask))
        if self.routing_heads:
            query, key, value = self._routing_projections(x)
            if cache is not None:
                cache.extend(query=query, key=key, value=value)
            if self.training and not self.kmeans.started and isinstance(self.kmeans, OnlineKMeans):
                self.kmeans.initialize(_together(query, key))
            heads.append(self._route(query, key, value, mask))
            if return_auxiliary:
                auxiliary = self._commitment(query, key)
            if self.training:
                self._learn(query, key)
        y = self.to_out(torch.cat(heads, -2).flatten(-2))
        return (y, auxiliary) if return_auxiliary else y

    def step(self, x: Tensor, cache: SequenceCache) -> Tensor:
        """Attends from one more position of a causal sequence.

        Centroids choose among the positions that exist so far, while earlier outputs stay what they were. `forward` on
        the longer sequence gives the same last row for the same inputs; it may give other outputs to earlier positions,
        which the new one has pushed out of a cluster, unless clusters are as large as the sequence.

        Args:
            x: (B, 1, C).
            cache: of the positions before; grows by one.

        Returns:
            (B, 1, C).

        Raises:
            ValueError: a layer that is not causal along one axis.
        """
        self.check_input(x)
        if not self.is_causal or self.rank != 1:
            raise ValueError(
                f"step needs causal attention along one axis; is_causal={self.is_causal}, {self.rank} axes"
            )
        start, heads = cache.length, []
        if self.local_heads:
            query, key, value = self._local_projections(x, start)
            keys, values = cache.extend(local_key=key, local_value=value)
            heads.append(block_attention_step(query, keys, values, self.window_size[0]))
        if self.routing_heads:
            query, key, value = self._routing_projections(x, start)
            query, *own_keys, value = cache.extend(query=query, key=key, value=value)
            options = self._routing_options(query)
            key = own_keys[0] if own_keys else None
            heads.append(routing_attention_step(query, key, value, self.kmeans.means, **options))
        return self.to_out(torch.cat(heads, -2).flatten(-2))

    def update_centroids(self) -> None:
        """Moves the centroids by the batches since the last update; needed with `defer_update` only."""
        if self.routing_heads:
            self.kmeans.update()

    def _local_projections(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.local_to_qkv(x).unflatten(-1, (3, self.local_heads, -1)).unbind(-3)
        if self.rotary:
            sin, cos = self._rotation(x, start)
            query, key = (rotate(t, sin, cos, interleaved=False) for t in (query, key))
        return query, key, value

    def _routing_projections(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
        # Rounding to the precision of autocast would move positions from one cluster to another.
        with torch.autocast(x.device.type, enabled=False):
            exact = x.to(self.to_q.weight.dtype)
            points = [self.to_q(exact)] if self.to_k is None else [self.to_q(exact), self.to_k(exact)]
        projected = [t.unflatten(-1, (self.routing_heads, -1)) for t in (*points, self.to_v(x))]
        if self.rotary:
            sin, cos = self._rotation(x, start)
            projected = [rotate(t, sin, cos) for t in projected]
        query, *own_keys, value = projected
        return query, own_keys[0] if own_keys else None, value

    def _rotation(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        grid = x.shape[1:-1]
        place = start + torch.arange(prod(grid), device=x.device, dtype=torch.float32).view(*grid, 1, 1)
        angle = place * rotary_frequencies(self.head_dim, device=x.device)
        return angle.sin(), angle.cos()

    def _attend_locally(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return block_attention(query, key, value, self.window_size, is_causal=self.is_causal, mask=mask)

    def _route(self, query: Tensor, key: Tensor | None, value: Tensor, mask: Tensor | None) -> Tensor:
        per_head = None if mask is None else mask.unsqueeze(-1)
        return routing_attention(
            query,
            key,
            value,
            self.kmeans.means,
            is_causal=self.is_causal,
            query_mask=per_head,
            key_mask=per_head,
            **self._routing_options(query),
        )

    def _routing_options(self, query: Tensor) -> dict[str, Any]:
        tables = tuple(self.relative_positions)
        return {
            "cluster_size": self._cluster_size(prod(query.shape[1:-2])),
            "norm": self.norm,
            "memory": None if self.mem_key is None or self.mem_value is None else (self.mem_key, self.mem_value),
            "relative": (tables[0], tables[1]) if tables else None,
        }

    def _commitment(self, query: Tensor, key: Tensor | None) -> Tensor:
        means = self.kmeans.means
        if self.norm == "unit":
            return commitment_loss(normalize_vectors(_together(query, key), self.norm), means)
        both = (query, query if key is None else key)
        return torch.stack([commitment_loss(normalize_vectors(t, self.norm), means) for t in both]).sum()

    def _learn(self, query: Tensor, key: Tensor | None) -> None:
        self.kmeans.accumulate(_together(query, key))
        if not self.defer_update:
            self.kmeans.update()

    def _cluster_size(self, positions: int) -> int:
        if self.cluster_size is not None:
            return min(self.cluster_size, positions)
        return (positions + self.num_clusters - 1) // self.num_clusters  # rounds up without negative numbers

    def macs(self, grid: Sequence[int]) -> int:
        n, projections = prod(grid), 3 * self.local_heads + (2 if self.shared_qk else 3) * self.routing_heads
        dense = n * self.dim * self.head_dim * (projections + self.local_heads + self.routing_heads)
        local = 2 * self.local_heads * self.head_dim * block_attention_pairs(grid, self.window_size, self.is_causal)
        if not self.routing_heads:
            return dense + local
        size, sides = self._cluster_size(n), 1 if self.shared_qk else 2
        memories = 0 if self.mem_key is None else self.mem_key.shape[2]
        offsets = sum(len(table) for table in self.relative_positions)
        per_cluster = sides * n + size * (2 * (size + memories) + offsets)
        return dense + local + self.routing_heads * self.num_clusters * self.head_dim * per_cluster

    def memory(self, grid: Sequence[int], bytes_per_element: int = 4) -> int:
        """Input, output, queries, keys, values, gathered copies, similarities and logits."""
        n, size = prod(grid), self._cluster_size(prod(grid))
        local = self.local_heads * 2 * block_attention_pairs(grid, self.window_size, self.is_causal)
        routing = self.routing_heads * self.num_clusters * (n + 4 * size * self.head_dim + 2 * size * size)
        return bytes_per_element * (5 * n * self.dim + local + routing)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """Weights of one query, local heads first; in routing heads they sum to n / (n + eps), n its clusters."""
        position = self.check_query(x, query)
        maps = []
        if self.local_heads:
            q, k, v = self._local_projections(x)
            maps.append(value_gradient_map(lambda value: self._attend_locally(q, k, value, None), v, position))
        if self.routing_heads:
            query_r, key_r, value_r = self._routing_projections(x)
            maps.append(value_gradient_map(lambda value: self._route(query_r, key_r, value, None), value_r, position))
        return torch.cat(maps, 1)


def _together(query: Tensor, key: Tensor | None) -> Tensor:
    """Queries and keys as one set of positions: (B, N or 2 N, heads, head_dim)."""
    return torch.cat([t.flatten(1, -3) for t in (query, key) if t is not None], 1)


def convert_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of the attention module of the PyTorch package `routing-transformer` -> state of `RoutingAttention`.

    Projections of layers without routing heads, memory of no entries and the frequencies of the rotation are left out.
    """
    converted = {}
    for name, tensor in state.items():
        if tensor.numel() and not name.startswith("local_attn."):
            converted[name.removeprefix("global_attn.")] = tensor
    return converted
