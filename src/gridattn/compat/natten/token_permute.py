"""`natten.token_permute`: the token permutation under NATTEN's names."""

from gridattn.ops.token_permutation import token_permute as token_permute_operation
from gridattn.ops.token_permutation import token_unpermute as token_unpermute_operation

__all__ = ["token_permute_operation", "token_unpermute_operation"]
