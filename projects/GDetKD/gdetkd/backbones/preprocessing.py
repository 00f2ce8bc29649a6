"""Describe how a detector's images are made."""

from dataclasses import dataclass
from typing import Sequence, Tuple

# Largest difference of a mean or a std that has no effect worth mentioning, in pixel values of 0 to 255.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Preprocessing:
    """Describe how a detector's images are made from RGB pixels of 0 to 255.

    Attributes:
        input_format: order of the channels, "RGB" or "BGR".
        mean: subtracted from the pixels, in that order.
        std: divides the pixels then, in that order.
    """

    input_format: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.input_format}, mean {_numbers(self.mean)}, std {_numbers(self.std)}"

    def agrees_with(self, other: "Preprocessing") -> bool:
        """Return whether the other preprocessing makes the same images, up to `TOLERANCE`."""
        if self.input_format != other.input_format or len(self.mean) != len(other.mean):
            return False
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std))
        return all(abs(value - wanted) <= TOLERANCE for value, wanted in pairs)

    def as_keys(self) -> str:
        """Return the config keys and values of this preprocessing, for a message."""
        mean, std = list(self.mean), list(self.std)
        return f'INPUT.FORMAT "{self.input_format}", MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}'


def of_unit_range(mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
    """Return the preprocessing of weights that expect RGB pixels of 0 to 1, as torchvision and timm state it."""
    return Preprocessing("RGB", *(tuple(round(255 * value, 3) for value in part) for part in (mean, std)))


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
