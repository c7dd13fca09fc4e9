"""Loss of semantic segmentation."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
"""Label of pixels that belong to no class: they count in no metric and give no gradient."""


def pixel_cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, summed over the labelled pixels and divided by the number of all pixels.

    L = -1/(B H W) * sum over pixels p with t_p != 255 of log softmax(z_p)[t_p]

    Dividing by all pixels, as the papers' training programs do, makes the mean over processes equal to the loss of
    their joint batch.

    Args:
        scores: z, (B, K, H, W), any floating dtype; computed in float32.
        target: t, (B, H, W), int64; class indices, or 255.

    Returns:
        A float32 scalar.

    Example:
        >>> import torch
        >>> target = torch.tensor([[[0, 255]]])
        >>> float(pixel_cross_entropy(torch.zeros(1, 2, 1, 2), target)) * 2 == float(torch.log(torch.tensor(2.0)))
        True
    """
    return F.cross_entropy(scores.float(), target, ignore_index=IGNORE, reduction="sum") / target.numel()
