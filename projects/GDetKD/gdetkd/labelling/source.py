"""The source of boxes: a teacher, a model of onnxruntime, or the results of another program."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.utils import comm

from .images import ImageFile

# If no coordinate is larger, the boxes are shares of the image's sides, not pixels. Some programs write such boxes.
LARGEST_RELATIVE = 1.5


@dataclass(frozen=True)
class Detections:
    """Hold the boxes of one image, in any order.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the file.
        scores: (N,) from 0 to 1.
        classes: (N,) index among the source's classes.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


class Source(ABC):
    """Give the boxes of images.

    Attributes:
        kind: "teacher", "results" or "onnx".
        class_names: the names of the source's classes in order, or None if they are unknown.
        num_classes: number of the source's classes.
    """

    kind: str
    class_names: Optional[Tuple[str, ...]]
    num_classes: int

    @abstractmethod
    def origin(self) -> Dict[str, str]:
        """Return what the written file says about the source: its files and their SHA-256."""

    @abstractmethod
    def settings(self) -> Dict[str, Any]:
        """Return everything that changes the boxes, as JSON values. A run continues only if nothing changed."""

    @abstractmethod
    def detect(self, images: Sequence[ImageFile]) -> Iterator[Tuple[ImageFile, Detections]]:
        """Yield the boxes of this process's part of the images. All processes together yield every image once."""


def own_part(images: Sequence[ImageFile]) -> List[ImageFile]:
    """Return the images of this process: every n-th image if there are n processes."""
    return list(images[comm.get_rank() :: comm.get_world_size()])
