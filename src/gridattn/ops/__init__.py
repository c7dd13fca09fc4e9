"""Pure functions on tensors: the mathematics of each mechanism, without parameters or state."""

from gridattn.ops.neighborhood import merge_attentions, neighborhood_attention
from gridattn.ops.token_permutation import token_permute, token_unpermute

__all__ = ["merge_attentions", "neighborhood_attention", "token_permute", "token_unpermute"]
