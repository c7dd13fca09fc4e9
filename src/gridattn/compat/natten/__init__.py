"""The public interface of NATTEN 0.21 on top of gridattn: `import gridattn.compat.natten as natten` ports a program.

Names, argument order, defaults, errors, modules with their state dicts, and results carry over unchanged. What differs:

* Any device, floating point dtype, head dimension and value head dimension works, and has a backward pass.
* NATTEN's backend names are accepted and leave the choice to gridattn; `na1d` to `na3d` also take gridattn's own names
  ("auto", "reference", "tiled", "cpu"). Another name raises NotImplementedError.
* Tile shapes, KV splits, kernel schedules and `torch_compile` tune kernels that are not here: they are checked, then
  ignored. So `get_configs_for_*` and `get_bwd_configs_for_*` return empty lists, and `HAS_LIBNATTEN` is False.
* Gradients flow through the returned logsumexp too, so `merge_attentions` needs no correction of its backward pass.

Example:
    >>> import torch
    >>> import gridattn.compat.natten as natten
    >>> q, k, v = torch.randn(3, 1, 16, 16, 4, 32)  # each (batch, height, width, heads, head_dim)
    >>> natten.na2d(q, k, v, kernel_size=7, dilation=2).shape
    torch.Size([1, 16, 16, 4, 32])
"""

from gridattn.compat.natten import context, functional, modules, token_permute, utils
from gridattn.compat.natten.configs import (
    get_bwd_configs_for_cutlass_blackwell_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)
from gridattn.compat.natten.context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from gridattn.compat.natten.functional import attention, merge_attentions, na1d, na2d, na3d
from gridattn.compat.natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__version__ = "0.21.7"
"""The NATTEN version whose interface this is; programs compare against it."""

HAS_LIBNATTEN = False
"""Whether NATTEN's compiled kernels are present."""

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "context",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "functional",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "modules",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "token_permute",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
    "utils",
]
