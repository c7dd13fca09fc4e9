"""From a picture to what the network takes, for training and for everything else."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from gridattn.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from gridattn.ops.common import per_axis

Transform = Callable[[Image.Image], Tensor]
BICUBIC = T.InterpolationMode.BICUBIC


@dataclass(frozen=True)
class Views:
    """How pictures of any size become tensors (3, H, W); stored with every trained network.

    Attributes:
        image_size: height and width of the tensors.
        resize: height and width to which a picture is brought before `image_size` is cut out of it, at the centre or,
            in training, anywhere; None brings it to `image_size` at once.
        mean: per channel, subtracted after scaling to 0..1.
        std: per channel, divided by afterwards.

    Raises:
        ValueError: a size below 1, or one larger than what it is cut out of.

    Example:
        >>> Views((448, 448), (550, 550)).fixed()(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 448, 448])
    """

    image_size: tuple[int, int]
    resize: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        size = per_axis(self.image_size, 2, "image_size")
        if self.resize is not None and any(a < b for a, b in zip(per_axis(self.resize, 2, "resize"), size)):
            raise ValueError(f"resize={self.resize} is smaller than image_size={self.image_size}, which is cut from it")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Views":
        """From plain values, as `plain` gives them."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in config.items()})

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def fixed(self) -> Transform:
        """The transform of validation, evaluation and prediction."""
        steps = [] if self.resize is None else [T.CenterCrop(self.image_size)]
        return T.Compose([self._resize(), *steps, *self._to_tensor()])

    def drawn(self, flip: float = 0.0, pad: int = 0, erase: float = 0.0) -> Transform:
        """The transform of training; it draws from torch's CPU generator.

        Args:
            flip: probability of mirroring left to right.
            pad: pixels of black around the picture, before `image_size` is cut out of it.
            erase: probability that a random rectangle is blanked.
        """
        steps: list[Any] = [self._resize()]
        if flip:
            steps.append(T.RandomHorizontalFlip(flip))
        if pad:
            steps.append(T.Pad(pad))
        if pad or self.resize is not None:
            steps.append(T.RandomCrop(self.image_size))
        steps += self._to_tensor()
        if erase:
            steps.append(T.RandomErasing(erase))
        return T.Compose(steps)

    def show(self, picture: Image.Image) -> Image.Image:
        """The part of a picture that the network sees, by `fixed`."""
        return T.Compose([self._resize(), T.CenterCrop(self.image_size)])(picture)

    def _resize(self) -> Any:
        return T.Resize(self.resize or self.image_size, interpolation=BICUBIC)

    def _to_tensor(self) -> list[Any]:
        return [T.ToTensor(), T.Normalize(self.mean, self.std)]
