"""The feed-forward of transformer blocks."""

from torch import Tensor, nn

from gridattn.layers.dropout import Dropout
from gridattn.layers.linear import apply_linear


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) for every position, with dropout after both.

    Args:
        dim: channels C.
        hidden: channels in between.
        dropout: dropout probability.
        tanh_gelu: the tanh approximation of GELU in place of the exact one.

    Example:
        >>> import torch
        >>> Mlp(8, 32)(torch.randn(2, 5, 7, 8)).shape
        torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, tanh_gelu: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU("tanh" if tanh_gelu else "none")
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden = self.drop(apply_linear(self.fc1, x, self.act))
        return self.drop(apply_linear(self.fc2, hidden))
