"""Neighborhood attention in the diffusion models of `diffusers`, without training.

Example:
    >>> from diffusers import UNet2DModel
    >>> from gridattn.compat.diffusers import replace_attention
    >>> model = UNet2DModel(
    ...     sample_size=16, block_out_channels=(8, 8), norm_num_groups=2, attention_head_dim=4, layers_per_block=1,
    ...     down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ... )
    >>> len(replace_attention(model, kernel_size=4, grids=[(16, 16), (8, 8)]).modules)
    4
"""

from gridattn.compat.diffusers.processors import NeighborhoodProcessor
from gridattn.compat.diffusers.replace import ReplacedAttention, replace_attention

__all__ = ["NeighborhoodProcessor", "ReplacedAttention", "replace_attention"]
