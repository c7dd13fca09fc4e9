"""The register of attention layers: one name each, so that a host network, `compare` and `show` can use any of them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, TypeVar

from gridattn.layers.common import GridAttention
from gridattn.ops.common import per_axis

Layer = TypeVar("Layer", bound=type[GridAttention])


@dataclass(frozen=True)
class AttentionInfo:
    """What a registered attention is and what it can do.

    Attributes:
        name: the registry name.
        layer: the class.
        summary: one line on what the mechanism does.
        source: title or arXiv id of the paper; "" for a standard baseline.
        ranks: numbers of grid axes it allows.
        causal: whether it takes `is_causal`.
        linear_cost: whether its cost grows linearly with the number of positions.
        min_size: smallest grid size per axis.
        exact_map: whether `attention_map` gives the mechanism's own weights rather than gradients.
        defaults: keywords that distinguish this name from others of the same class.
    """

    name: str
    layer: type[GridAttention]
    summary: str
    source: str
    ranks: tuple[int, ...]
    causal: bool
    linear_cost: bool
    min_size: int
    exact_map: bool
    defaults: dict[str, Any]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the constructor's keywords beyond dim, num_heads and grid."""
        names = inspect.signature(self.layer.__init__).parameters
        return tuple(name for name in names if name not in ("self", "dim", "num_heads", "grid", *self.defaults))


_REGISTRY: dict[str, AttentionInfo] = {}


def register_attention(
    name: str,
    *,
    summary: str,
    source: str = "",
    ranks: Sequence[int] = (1, 2, 3),
    causal: bool = False,
    linear_cost: bool = False,
    min_size: int = 1,
    exact_map: bool | None = None,
    **defaults: Any,
) -> Callable[[Layer], Layer]:
    """Class decorator that enters a layer under `name`.

    `exact_map` is the class's own unless given; `defaults` are constructor keywords fixed for that name.
    """

    def enter(layer: Layer) -> Layer:
        if name in _REGISTRY:
            raise ValueError(f"attention {name!r} is registered twice")
        exact = layer.exact_map if exact_map is None else exact_map
        _REGISTRY[name] = AttentionInfo(
            name, layer, summary, source, tuple(ranks), causal, linear_cost, min_size, exact, defaults
        )
        return layer

    return enter


def list_attentions(pattern: str = "*") -> list[str]:
    """Names of the registered attentions that match a shell pattern, in alphabetical order.

    Example:
        >>> "neighborhood" in list_attentions()
        True
    """
    return sorted(name for name in _REGISTRY if fnmatch(name, pattern))


def attention_info(name: str) -> AttentionInfo:
    """The record of one registered attention.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in _REGISTRY:
        raise ValueError(f"attention={name!r} is not known; allowed: {', '.join(list_attentions())}")
    return _REGISTRY[name]


def create_attention(
    name: str, dim: int, num_heads: int = 4, *, grid: Sequence[int] = (14, 14), **options: Any
) -> GridAttention:
    """Builds a registered attention layer.

    Args:
        name: one of `list_attentions()`.
        dim: number of channels.
        num_heads: number of heads; mechanisms without heads ignore it.
        grid: the nominal grid. Its length is the number of axes; position tables are sized by it. Other grid sizes of
            the same
            rank can be fed to the layer.
        **options: further keywords of the layer (`attention_info(name).options`).

    Returns:
        A layer from (B, *grid, dim) to (B, *grid, dim).

    Raises:
        ValueError: an unknown name or option, a rank that the mechanism does not have, or a value that its
            constructor refuses.

    Example:
        >>> import torch
        >>> layer = create_attention("neighborhood", dim=32, num_heads=4, kernel_size=5)
        >>> layer(torch.randn(1, 14, 14, 32)).shape
        torch.Size([1, 14, 14, 32])
    """
    info = attention_info(name)
    grid = per_axis(tuple(grid), len(grid), "grid")
    if len(grid) not in info.ranks:
        raise ValueError(f"grid={grid} has {len(grid)} axes; attention {name!r} allows {info.ranks}")
    if any(size < info.min_size for size in grid):
        raise ValueError(f"grid={grid} is too small; attention {name!r} needs at least {info.min_size} per axis")
    unknown = sorted(set(options) - set(info.options))
    if unknown:
        raise ValueError(f"attention {name!r} has no option {unknown[0]!r}; allowed: {', '.join(info.options)}")
    return info.layer(dim, num_heads, grid=grid, **info.defaults, **options)  # pyright: ignore[reportCallIssue]
