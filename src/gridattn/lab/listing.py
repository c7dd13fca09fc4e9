"""What there is: the registered attentions, models, systems and datasets, and the papers behind them, as plain rows."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

from gridattn.catalog import PAPERS
from gridattn.data import list_datasets
from gridattn.layers import attention_info, list_attentions
from gridattn.models import list_models, model_info
from gridattn.systems import get_system, list_systems

Row = dict[str, Any]


def listing(kinds: Sequence[str], pattern: str = "*") -> dict[str, list[Row]]:
    """Rows of every kind asked for whose name matches a shell pattern.

    Args:
        kinds: of "attentions", "models", "systems", "datasets", "papers".
        pattern: shell pattern of names.

    Returns:
        For each kind its rows; every row has "name".

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> [row["name"] for row in listing(["attentions"], "*lobal")["attentions"]]
        ['global']
    """
    for kind in kinds:
        if kind not in _ROWS:
            raise ValueError(f"kind={kind!r} is not known; allowed: {', '.join(_ROWS)}")
    return {kind: [row for row in _ROWS[kind]() if fnmatch(row["name"], pattern)] for kind in kinds}


def _attentions() -> list[Row]:
    infos = [attention_info(name) for name in list_attentions()]
    return [
        {
            "name": info.name,
            "summary": info.summary,
            "source": info.source,
            "axes": list(info.ranks),
            "causal": info.causal,
            "linear_cost": info.linear_cost,
            "exact_map": info.exact_map,
            "options": list(info.options),
        }
        for info in infos
    ]


def _models() -> list[Row]:
    return [{"name": name, "source": model_info(name).source} for name in list_models()]


def _systems() -> list[Row]:
    return [{"name": name, "summary": get_system(name).summary} for name in list_systems()]


def _datasets() -> list[Row]:
    return [{"name": name} for name in list_datasets()]


def _papers() -> list[Row]:
    return [
        {
            "name": paper.slug,
            "status": paper.status,
            "title": paper.title,
            "year": paper.year,
            "arxiv": paper.arxiv,
            "available": list(paper.available),
            "missing": list(paper.missing),
        }
        for paper in PAPERS
    ]


_ROWS: dict[str, Callable[[], list[Row]]] = {
    "attentions": _attentions,
    "models": _models,
    "systems": _systems,
    "datasets": _datasets,
    "papers": _papers,
}
