"""Stochastic depth: whole residual branches dropped at random while training."""

from torch import Tensor, nn

from gridattn.ops.common import check_probability


class DropPath(nn.Module):
    """Zeroes a residual branch for a random share of the samples in training and divides the others by the share kept.

    Args:
        probability: of dropping a sample's branch.

    Source: Deep Networks with Stochastic Depth, arXiv 1603.09382.

    Example:
        >>> import torch
        >>> DropPath(0.5).eval()(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        check_probability("probability", probability)
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        return x * (x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
