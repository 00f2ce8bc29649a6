"""The description of a teacher that its file gives before the teacher is built."""

from abc import ABC, abstractmethod
from typing import Any, Dict, List, Optional, Tuple

from torch import nn


class TeacherFile(ABC):
    """Describe a teacher before it is built.

    Attributes:
        path: path of the config file.
        weights: path or URL of the weights, or "" if none is given.
        input_format: channel order of the images, "RGB" or "BGR".
    """

    path: str
    weights: str
    input_format: str

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the detector with random weights, on the student's device."""

    @abstractmethod
    def content(self) -> str:
        """Return the parts of the file that describe the detector, its images and its classes, to compare teachers."""

    @abstractmethod
    def class_names(self) -> Optional[Tuple[str, ...]]:
        """Return the class names of the teacher's training dataset in order, or None if they are unknown here."""

    def other_settings(self, settings: Dict[str, Any]) -> List[str]:
        """Describe the differences between the settings that its weights were trained with and those of the file.

        Args:
            settings: `TrainedWith.settings`.
        """
        return []

    def limits(self) -> Dict[str, Any]:
        """Return the settings outside of `content` that limit the detections of an evaluation."""
        return {}

    def check_can_detect(self) -> None:
        """Raise a GDetKDError if the file does not say how images are prepared for an evaluation."""
        return

    @abstractmethod
    def test_loader(self, dataset_name: str) -> Any:
        """Load the images of a registered dataset in the size and channel order of the teacher's evaluation."""
