"""Rotary positions: pairs of channels turned by an angle that grows with the position of the token."""

import torch
from torch import Tensor


def rotary_frequencies(head_dim: int, *, closed: bool = False, device: torch.device | None = None) -> Tensor:
    """Angles per step of position, f_m = 10000 ** (-m / M) for the pairs m = 0 ... head_dim / 2 - 1.

    Args:
        head_dim: channels of a head, even.
        closed: M = head_dim / 2 - 1, so that the last frequency is 1 / 10000 itself, in place of M = head_dim / 2.
        device: of the result.

    Returns:
        (head_dim / 2), float32.

    Raises:
        ValueError: an odd `head_dim`.

    Example:
        >>> rotary_frequencies(4).tolist(), rotary_frequencies(4, closed=True).tolist()
        ([1.0, 0.009999999776482582], [1.0, 9.999999747378752e-05])
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary positions turn pairs of channels")
    pairs = head_dim // 2
    last = 1.0 if closed else (pairs - 1) / pairs
    return 1.0 / 10000 ** torch.linspace(0, last, pairs, device=device)


def rotate(x: Tensor, sin: Tensor, cos: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turns every pair (a, b) of channels to (a cos - b sin, b cos + a sin).

    Args:
        x: (..., head_dim).
        sin: (..., head_dim / 2), broadcast against the pairs of `x`.
        cos: like `sin`.
        interleaved: a pair is the channels 2m and 2m + 1; else m and m + head_dim / 2.

    Returns:
        Like `x`.

    Source: Su et al., RoFormer, arXiv 2104.09864.

    Example:
        >>> rotate(torch.tensor([1.0, 0.0]), torch.tensor([1.0]), torch.tensor([0.0])).tolist()
        [0.0, 1.0]
    """
    same_kind = x.device.type == "cpu" and x.dtype == sin.dtype == cos.dtype == torch.float32
    if interleaved and same_kind and not torch.compiler.is_compiling():  # compilers know no complex numbers
        return _rotate_complex(x, sin, cos)
    axis = -1 if interleaved else -2
    a, b = x.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2).to(x.dtype)


def _rotate_complex(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Pairs as complex numbers, one pass over `x`: several times faster on a CPU than half a dozen strided ones."""
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
