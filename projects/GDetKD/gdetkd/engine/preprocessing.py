"""Find out how a detector's images are made, and let a teacher see images made in another way."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from torch import nn

from ..backbones import Preprocessing, find_bottom_up
from ..teacher import FrozenTeacher

# Detectors in circulation were trained with these.
USUAL = (
    Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),  # Detectron2, Caffe
    Preprocessing("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),  # Detectron2's ResNeXt
    Preprocessing("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision
    Preprocessing("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    Preprocessing("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
)


def with_channels_swapped(preprocessing: Preprocessing) -> Preprocessing:
    """Return the same mean and std with RGB for BGR, or BGR for RGB. A wrong INPUT.FORMAT would need this."""
    other_format = "RGB" if preprocessing.input_format == "BGR" else "BGR"
    return Preprocessing(other_format, preprocessing.mean, preprocessing.std)


def preprocessing_of(model: Any, input_format: str) -> Optional[Preprocessing]:
    """Return the preprocessing of a built detector, or None if it does not use a mean and a std."""
    if not (hasattr(model, "pixel_mean") and hasattr(model, "pixel_std")):
        return None
    mean, std = (tuple(round(v, 3) for v in part.flatten().tolist()) for part in (model.pixel_mean, model.pixel_std))
    return Preprocessing(input_format, mean, std)


def other_than_pretrained(student: nn.Module, input_format: str) -> str:
    """Compare a student's images with those that its backbone's ImageNet weights expect.

    Returns:
        a message about a difference, or "" if there is none or if the backbone does not state what it expects.
    """
    bottom_up, images = find_bottom_up(student), preprocessing_of(student, input_format)
    if bottom_up is None or images is None or images.agrees_with(bottom_up.preprocessing):
        return ""
    return (
        f"The backbone starts from {bottom_up.key} {bottom_up.weights!r}, which expects images in "
        f"{bottom_up.preprocessing}, but the student's images are in {images}. So the weights are worth little. Set "
        f"{bottom_up.preprocessing.as_keys()}."
    )


@contextmanager
def teacher_sees(teacher: FrozenTeacher, preprocessing: Preprocessing) -> Iterator[None]:
    """Give the teacher another pixel mean and std inside, and restore them afterwards.

    The teacher's loader keeps the order of the channels: see `FlippedChannels`.
    """
    mean, std = teacher.model.pixel_mean, teacher.model.pixel_std
    mean_before, std_before = mean.clone(), std.clone()
    mean.copy_(torch.tensor(preprocessing.mean).view_as(mean))
    std.copy_(torch.tensor(preprocessing.std).view_as(std))
    try:
        yield
    finally:
        mean.copy_(mean_before)
        std.copy_(std_before)


class FlippedChannels:
    """Load the batches of another loader, with the channels of each image in reverse order."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        for batch in self._loader:
            yield [{**sample, "image": sample["image"].flip(0)} for sample in batch]
