"""One grid over several devices: slabs along its axes, and the exchange of the rows around them."""

from gridattn.parallel.attention import sharded_neighborhood_attention
from gridattn.parallel.exchange import ExchangeCount, count_exchange
from gridattn.parallel.grids import gather_grid, shard_grid
from gridattn.parallel.layers import ShardedNeighborhoodAttention, parallelize

__all__ = [
    "ExchangeCount",
    "ShardedNeighborhoodAttention",
    "count_exchange",
    "gather_grid",
    "parallelize",
    "shard_grid",
    "sharded_neighborhood_attention",
]
