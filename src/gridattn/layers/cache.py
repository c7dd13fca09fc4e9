"""What an attention layer keeps of the positions it has seen, when a sequence is made position by position."""

from torch import Tensor


class SequenceCache:
    """Tensors (B, T, ...) by name that grow along T; room is doubled when it runs out.

    Attributes:
        length: positions so far, T.

    Example:
        >>> import torch
        >>> cache = SequenceCache()
        >>> for _ in range(3):
        ...     keys = cache.extend(key=torch.randn(2, 1, 4))[0]
        >>> keys.shape, cache.length
        (torch.Size([2, 3, 4]), 3)
    """

    def __init__(self) -> None:
        self.length = 0
        self._stored: dict[str, Tensor] = {}
        self._used: dict[str, int] = {}

    def extend(self, **new: Tensor | None) -> list[Tensor]:
        """Appends positions and returns all of each name, in the order given; None is passed over.

        Args:
            new: (B, n, ...) by name; every name must get the same positions over time.
        """
        whole = []
        for name, tensor in new.items():
            if tensor is None:
                continue
            used = self._used.get(name, 0)
            end = used + tensor.shape[1]
            stored = self._stored.get(name)
            if stored is None or end > stored.shape[1]:
                larger = tensor.new_empty(tensor.shape[0], max(2 * used, end), *tensor.shape[2:])
                if stored is not None:
                    larger[:, :used] = stored[:, :used]
                self._stored[name] = stored = larger
            stored[:, used:end] = tensor
            self._used[name] = end
            self.length = max(self.length, end)
            whole.append(stored[:, :end])
        return whole
