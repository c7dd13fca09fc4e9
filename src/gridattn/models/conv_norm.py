"""Convolution and batch normalisation of channels-first images, and their weights as published."""

from torch import Tensor, nn


def conv_norm(
    in_dim: int, out_dim: int, kernel_size: int = 3, stride: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Convolution of odd width without bias, batch normalisation, and an activation if given.

    Args:
        in_dim: input channels.
        out_dim: output channels.
        kernel_size: odd; the padding of kernel_size // 2 makes the output size ceil(size / stride).
        stride: of the convolution.
        activation: applied last; has no parameters.

    Returns:
        (B, in_dim, H, W) -> (B, out_dim, ceil(H / stride), ceil(W / stride)), with the convolution at index 0 and the
        normalisation at index 1.

    Example:
        >>> import torch
        >>> conv_norm(3, 8, stride=2)(torch.randn(2, 3, 9, 12)).shape
        torch.Size([2, 8, 5, 6])
    """
    conv = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim), *([] if activation is None else [activation]))


def batch_counters(model: nn.Module) -> dict[str, Tensor]:
    """The counters of batches that the normalisations of `model` keep, which published files may lack.

    Example:
        >>> batch_counters(conv_norm(3, 8))
        {'1.num_batches_tracked': tensor(0)}
    """
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
