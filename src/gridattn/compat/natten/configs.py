"""Tile configurations of NATTEN's kernels.

None of those kernels is part of this library and a tile shape changes nothing in a result, so there is nothing to
choose: every list is empty, as on a machine without the hardware for a kernel. A tuner that loops over a list runs no
trial; leaving the tile arguments at None is always right.
"""

from torch import Tensor


def no_configurations(query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> list:
    """Tile configurations of a kernel for these tensors: none.

    Example:
        >>> import torch
        >>> no_configurations(torch.randn(1, 8, 8, 2, 32))
        []
    """
    return []


get_configs_for_cutlass_fmha = no_configurations
get_configs_for_cutlass_fna = no_configurations
get_configs_for_cutlass_hopper_fmha = no_configurations
get_configs_for_cutlass_hopper_fna = no_configurations
get_configs_for_cutlass_blackwell_fmha = no_configurations
get_configs_for_cutlass_blackwell_fna = no_configurations
get_configs_for_flex_fmha = no_configurations
get_configs_for_flex_fna = no_configurations
get_bwd_configs_for_cutlass_fmha = no_configurations
get_bwd_configs_for_cutlass_fna = no_configurations
get_bwd_configs_for_cutlass_hopper_fmha = no_configurations
get_bwd_configs_for_cutlass_hopper_fna = no_configurations
get_bwd_configs_for_cutlass_blackwell_fmha = no_configurations
get_bwd_configs_for_cutlass_blackwell_fna = no_configurations
