"""Batch normalisation of channels-last grids."""

from torch import Tensor, nn


class GridBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each channel over the batch and every position of a grid of any rank.

    Same parameters, buffers and numbers as `nn.BatchNorm2d` on a channels-first image.

    Example:
        >>> import torch
        >>> GridBatchNorm(8)(torch.randn(2, 5, 7, 8)).shape
        torch.Size([2, 5, 7, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)."""
        return super().forward(input.reshape(-1, input.shape[-1])).view(input.shape)

    def gain_and_offset(self) -> tuple[Tensor, Tensor]:
        """(gain, offset), each (C), such that in eval mode the output is gain * input + offset."""
        assert self.running_var is not None
        assert self.running_mean is not None
        gain = self.weight * (self.running_var + self.eps).rsqrt()
        return gain, self.bias - self.running_mean * gain
