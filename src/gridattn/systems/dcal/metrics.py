"""Metrics of re-identification: mean average precision, mean inverse negative penalty, cumulative matches."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

QUERY, GALLERY, PADDING = 0, 1, -1
CHUNK = 256  # queries whose distances are held at once


def euclidean(query: Tensor, gallery: Tensor) -> Tensor:
    """Euclidean distances, (Q, D) and (G, D) -> (Q, G)."""
    return torch.cdist(query, gallery)


def ranked_queries(
    distances: Tensor, query_ids: Tensor, gallery_ids: Tensor, query_cameras: Tensor, gallery_cameras: Tensor
) -> dict[str, Tensor]:
    """What each query finds in a gallery ranked by distance.

    Items of the query's identity seen by the query's camera are dropped from its list. With matches at ranks
    r_1 < ... < r_M of the list,

        AP = mean_i (i / r_i),   INP = M / r_M

    Args:
        distances: (Q, G); only their order counts, equal ones keep the order of the gallery.
        query_ids: (Q).
        gallery_ids: (G).
        query_cameras: (Q).
        gallery_cameras: (G).

    Returns:
        `ap`, `inp` (float64) and `first` (int64, rank of the first match, from 1) of the queries with a match.

    Source: protocol of Market-1501; INP: Ye et al., arXiv 2001.04193.

    Example:
        >>> same = torch.tensor([True, False, True, False, False, True]).int()
        >>> one, six = torch.ones(1), torch.zeros(6)
        >>> found = ranked_queries(torch.arange(6.0)[None], one, same, one, six)
        >>> round(float(found["ap"]), 6), float(found["inp"])
        (0.722222, 0.5)
    """
    order = distances.argsort(dim=1, stable=True)
    match = gallery_ids[order] == query_ids[:, None]
    kept = ~(match & (gallery_cameras[order] == query_cameras[:, None]))
    match &= kept
    valid = match.any(1)
    match, rank = match[valid], kept[valid].cumsum(1)
    hits = match.cumsum(1)
    count, last = hits[:, -1], torch.where(match, rank, 0).amax(1)
    return {
        "ap": torch.where(match, hits / rank.clamp_min(1).double(), 0.0).sum(1) / count,
        "inp": count.double() / last,
        "first": torch.where(match, rank, rank.shape[1] + 1).amin(1),
    }


def retrieval_report(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    *,
    max_rank: int = 10,
) -> dict[str, Any]:
    """Metrics of a set of queries; see `ranked_queries` for the rule of the cameras.

    Args:
        query: (Q, D), features.
        gallery: (G, D).
        query_ids: (Q).
        gallery_ids: (G).
        query_cameras: (Q).
        gallery_cameras: (G).
        max_rank: length of the curve of cumulative matches.

    Returns:
        `mAP` and `mINP`, means over the queries with a match; `cmc`, by k the share of them with a match among the
        first k; `valid_queries`, their number; `queries` and `gallery`, numbers of images. Without valid queries the
        metrics are 0.
    """
    parts = [
        ranked_queries(euclidean(q, gallery), ids, gallery_ids, cameras, gallery_cameras)
        for q, ids, cameras in zip(query.split(CHUNK), query_ids.split(CHUNK), query_cameras.split(CHUNK))
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in ("ap", "inp", "first")} if parts else {}
    valid = len(found["ap"]) if parts else 0
    curve = [float((found["first"] <= k).double().mean()) if valid else 0.0 for k in range(1, max_rank + 1)]
    return {
        "mAP": float(found["ap"].mean()) if valid else 0.0,
        "mINP": float(found["inp"].mean()) if valid else 0.0,
        "cmc": curve,
        "valid_queries": valid,
        "queries": len(query),
        "gallery": len(gallery),
    }


class Retrieval(Metric):
    """Collects features over batches and processes; padding (kind -1) is passed over.

    Example:
        >>> metric, one = Retrieval(), torch.ones(1, dtype=torch.long)
        >>> metric.update(torch.zeros(1, 4), 5 * one, one, 0 * one)
        >>> metric.update(torch.ones(2, 4), torch.tensor([5, 6]), torch.tensor([2, 2]), torch.tensor([1, 1]))
        >>> metric.compute()["mAP"]
        1.0
    """

    full_state_update = False
    _entries = ("features", "identities", "cameras", "kinds")

    def __init__(self) -> None:
        super().__init__()
        for name in self._entries:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, identities: Tensor, cameras: Tensor, kinds: Tensor) -> None:
        """Features (B, D) with identity, camera and kind (`QUERY`, `GALLERY` or `PADDING`) of each, (B)."""
        for name, value in zip(self._entries, (features.float(), identities, cameras, kinds)):
            getattr(self, name).append(value)

    def compute(self) -> dict[str, Any]:
        """What `retrieval_report` gives."""
        features, *labels = (dim_zero_cat(getattr(self, name)).cpu() for name in self._entries)
        kinds = labels.pop()
        query, gallery = kinds == QUERY, kinds == GALLERY
        (identities, cameras) = labels
        return retrieval_report(
            features[query],
            features[gallery],
            identities[query],
            identities[gallery],
            cameras[query],
            cameras[gallery],
        )
