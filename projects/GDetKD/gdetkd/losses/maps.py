"""What losses on whole feature maps share: levels matched by stride, adapters, and the cells that objects cover.

Shapes: B images, C_S and C_T channels, (H, W) the cells of a level, G objects of an image.
"""

import logging
from typing import List, NamedTuple, Sequence, Tuple

import torch
from torch import nn

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DistillLoss

logger = logging.getLogger(__name__)


class Level(NamedTuple):
    """A level that both pyramids have: pixels per cell, and its name in each."""

    stride: int
    student: str
    teacher: str


def match_levels(loss: str, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> Tuple[Level, ...]:
    """The levels of the same stride, finest first.

    Args:
        loss: its name, for messages.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """
    of_teacher = {stride: name for name, stride in teacher_spec.strides.items()}
    levels = tuple(
        Level(stride, name, of_teacher[stride]) for name, stride in student_spec.strides.items() if stride in of_teacher
    )
    if not levels:
        raise GDetKDError(
            f"{loss} compares feature maps of the same stride, but the student's are {_strides(student_spec)} and the "
            f"teacher's {_strides(teacher_spec)}. Take {loss} out of DISTILL.LOSSES: SGFI and CKD compare regions and "
            "need no common stride."
        )
    common = {level.stride for level in levels}
    left = [
        f"{name} (1/{stride}) of the {role}"
        for role, spec in (("student", student_spec), ("teacher", teacher_spec))
        for name, stride in spec.strides.items()
        if stride not in common
    ]
    if left:
        logger.warning("%s leaves out levels whose stride the other pyramid lacks: %s.", loss, ", ".join(left))
    return levels


def _strides(spec: DetectorSpec) -> str:
    return ", ".join(f"{name} 1/{stride}" for name, stride in spec.strides.items())


class MapLoss(DistillLoss):
    """A term on the feature maps of whole images, on the levels that both pyramids have.

    Raises:
        GDetKDError: there is no such level.
    """

    def __init__(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        self.levels = match_levels(type(self).__name__, student_spec, teacher_spec)

    def maps(self, student: DetectorOutputs, teacher: DetectorOutputs) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """The maps (B, C_S, H, W) and (B, C_T, H, W) of each level.

        The two pad images to multiples of other numbers, on the right and below: what one alone has is cut off.
        """
        pairs = []
        for level in self.levels:
            ours, its = full_precision(student.pyramid[level.student]), full_precision(teacher.pyramid[level.teacher])
            height, width = (min(sizes) for sizes in zip(ours.shape[-2:], its.shape[-2:]))
            pairs.append((ours[..., :height, :width], its[..., :height, :width]))
        return pairs


def adapters(
    levels: Sequence[Level], student_spec: DetectorSpec, teacher_spec: DetectorSpec, kernel_size: int = 1
) -> nn.ModuleList:
    """A convolution C_S -> C_T of the student's map for each level."""
    channels = student_spec.channels, teacher_spec.channels
    return nn.ModuleList(nn.Conv2d(*channels, kernel_size, padding=kernel_size // 2) for _ in levels)


def adapters_where_widths_differ(
    levels: Sequence[Level], student_spec: DetectorSpec, teacher_spec: DetectorSpec
) -> nn.ModuleList:
    """1x1 convolutions C_S -> C_T, one for each level; nothing is done to maps that are as wide as the teacher's."""
    if student_spec.channels == teacher_spec.channels:
        return nn.ModuleList(nn.Identity() for _ in levels)
    return adapters(levels, student_spec, teacher_spec)


def covered_cells(boxes: torch.Tensor, stride: int, size: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Which rows and columns of a map each box reaches into; at least one of each.

    Args:
        boxes: (G, 4) xyxy in pixels.
        stride: pixels per cell.
        size: (H, W).

    Returns:
        (G, H) and (G, W), bool. Cell (y, x) is in box g where both rows[g, y] and columns[g, x] hold.
    """

    def covered(start: torch.Tensor, end: torch.Tensor, cells: int) -> torch.Tensor:
        first = (start / stride).floor().clamp(0, cells - 1)
        last = torch.maximum((end / stride).ceil() - 1, first).clamp(max=cells - 1)
        cell = torch.arange(cells, device=boxes.device)
        return (cell >= first[:, None]) & (cell <= last[:, None])

    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return covered(y1, y2, size[0]), covered(x1, x2, size[1])


def masked_squared_error(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Squared errors summed over masked cells and channels, and the number of those cells, over all levels.

    Args:
        student, teacher: by level, (B, C, H, W).
        masks: by level, (B, H, W), bool.

    Returns:
        two scalars.
    """
    errors = [((ours - its) ** 2 * mask[:, None]).sum() for ours, its, mask in zip(student, teacher, masks)]
    return torch.stack(errors).sum(), torch.stack([mask.sum() for mask in masks]).sum()
