"""PSNR and SSIM of light fields: on Y, view by view, averaged over views, then scenes, then datasets."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gridattn.systems.epit.fields import rgb_to_ycbcr

_RADIUS = 5  # of the Gaussian window: 3.5 sigma
_SIGMA = 1.5
PUBLISHED_RANGE = 2.0
"""The data range with which the published SSIM values were computed, though the data lie in 0..1."""


def view_psnr(ours: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / mean squared error), in dB, of every view; infinite where nothing differs.

    Args:
        ours: (U, V, H, W), not clipped; computed in float64.
        truth: the same.

    Returns:
        (U, V), float64.
    """
    return -10 * (ours.double() - truth.double()).square().mean((-2, -1)).log10()


def view_ssim(ours: Tensor, truth: Tensor, data_range: float = PUBLISHED_RANGE) -> Tensor:
    """Structural similarity of every view.

    Gaussian window of sigma 1.5 and 11 x 11 taps, K1 = 0.01, K2 = 0.03, covariances with the factor N / (N - 1),
    N = 121, mean over the image without the outer 5 pixels.

    Args:
        ours: (U, V, H, W); computed in float64.
        truth: the same.
        data_range: L in C = (K L)^2; the published values have 2.

    Returns:
        (U, V), float64.

    Raises:
        ValueError: views below 11 x 11 pixels.
    """
    height, width = truth.shape[-2:]
    taps = 2 * _RADIUS + 1
    if min(height, width) < taps:
        raise ValueError(
            f"views of {height} x {width} pixels are too small for SSIM; at least {taps} x {taps} is needed"
        )
    offset = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float64, device=truth.device)
    window = torch.exp(-0.5 * (offset / _SIGMA) ** 2)
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        image = F.conv2d(image, window.view(1, 1, -1, 1))
        return F.conv2d(image, window.view(1, 1, 1, -1))

    x, y = (field.double().reshape(-1, 1, height, width) for field in (ours, truth))
    mean_x, mean_y = mean(x), mean(y)
    factor = taps**2 / (taps**2 - 1)
    var_x, var_y = factor * (mean(x * x) - mean_x**2), factor * (mean(y * y) - mean_y**2)
    covariance = factor * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean((1, 2, 3)).view(truth.shape[:-2])


def scene_scores(ours: Tensor, truth: Tensor) -> dict[str, float]:
    """psnr and ssim (data range 2) and ssim_range1, means over the views, and centre_psnr, on Y of RGB light fields.

    Args:
        ours: (3, U, V, H, W), RGB.
        truth: the same.
    """
    y, target = rgb_to_ycbcr(ours.double())[0], rgb_to_ycbcr(truth.double())[0]
    psnr = view_psnr(y, target)
    return {
        "psnr": float(psnr.mean()),
        "ssim": float(view_ssim(y, target).mean()),
        "ssim_range1": float(view_ssim(y, target, 1.0).mean()),
        "centre_psnr": float(psnr[psnr.shape[0] // 2, psnr.shape[1] // 2]),
    }


class SceneMeans(Metric):
    """Means of `scene_scores` over the scenes of every dataset, then over the datasets.

    Args:
        groups: datasets; those without a scene are left out.
    """

    full_state_update = False
    names = ("psnr", "ssim", "ssim_range1", "centre_psnr")

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        self.add_state("sums", torch.zeros(groups, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(groups, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: dict[str, float], group: int) -> None:
        """Adds the scores of one scene of the dataset with index `group`."""
        self.sums[group] += torch.tensor([scores[name] for name in self.names], dtype=torch.float64).to(self.sums)
        self.counts[group] += 1

    def per_group(self) -> Tensor:
        """(groups, 4), float64; NaN for a dataset without a scene."""
        return self.sums / self.counts[:, None]

    def compute(self) -> dict[str, float]:
        """The means over the datasets, by name."""
        return dict(zip(self.names, self.per_group().nanmean(0).tolist()))


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every entry of equally keyed rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
