"""Dropout that costs next to nothing where nothing is dropped."""

from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that gives its input back where nothing is dropped, without asking PyTorch's operator.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 3)
        >>> Dropout(0.5).eval()(x) is x
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.training and self.p else input
