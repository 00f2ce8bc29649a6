"""Shared parts of the losses on whole feature maps: levels matched by stride, adapters, and the cells of objects.

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
    """Name a level that both pyramids have."""

    stride: int  # pixels per cell
    student: str
    teacher: str


def match_levels(loss: str, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> Tuple[Level, ...]:
    """Match the levels of the two pyramids by stride, finest first.

    Args:
        loss: name of the loss, for messages.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """
    teacher_names = {stride: name for name, stride in teacher_spec.strides.items()}
    levels = tuple(
        Level(stride, name, teacher_names[stride])
        for name, stride in student_spec.strides.items()
        if stride in teacher_names
    )
    if not levels:
        raise GDetKDError(
            f"{loss} compares feature maps of the same stride, but student ({_strides(student_spec)}) and teacher "
            f"({_strides(teacher_spec)}) have no stride in common. Take {loss} out of DISTILL.LOSSES. SGFI and CKD "
            "compare regions and need no common stride."
        )
    common = {level.stride for level in levels}
    unmatched = [
        f"{name} (1/{stride}) of the {role}"
        for role, spec in (("student", student_spec), ("teacher", teacher_spec))
        for name, stride in spec.strides.items()
        if stride not in common
    ]
    if unmatched:
        logger.warning("%s leaves out levels whose stride only one pyramid has: %s.", loss, ", ".join(unmatched))
    return levels


def _strides(spec: DetectorSpec) -> str:
    return ", ".join(f"{name} 1/{stride}" for name, stride in spec.strides.items())


class MapLoss(DistillLoss):
    """Compare the feature maps of whole images, on the levels of the strides that both pyramids have.

    A subclass sets `adapters`, a module for each level that takes the student's map to the teacher's width.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """

    adapters: nn.ModuleList

    def __init__(self, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        self.levels = match_levels(type(self).__name__, student_spec, teacher_spec)

    def maps(self, student: DetectorOutputs, teacher: DetectorOutputs) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """Return, by level, the adapted student's map and the teacher's map, both (B, C_T, H, W).

        The two detectors can pad images differently, on the right and below. The maps are cropped to the common part.
        """
        pairs = []
        for level, adapter in zip(self.levels, self.adapters):
            student_map = full_precision(student.pyramid[level.student])
            teacher_map = full_precision(teacher.pyramid[level.teacher])
            height, width = (min(sizes) for sizes in zip(student_map.shape[-2:], teacher_map.shape[-2:]))
            pairs.append((adapter(student_map[..., :height, :width]), teacher_map[..., :height, :width]))
        return pairs


def adapters(
    levels: Sequence[Level], student_spec: DetectorSpec, teacher_spec: DetectorSpec, kernel_size: int = 1
) -> nn.ModuleList:
    """Build a convolution C_S -> C_T for each level. It adapts the student's map to the teacher's width."""
    channels = student_spec.channels, teacher_spec.channels
    return nn.ModuleList(nn.Conv2d(*channels, kernel_size, padding=kernel_size // 2) for _ in levels)


def adapters_where_widths_differ(
    levels: Sequence[Level], student_spec: DetectorSpec, teacher_spec: DetectorSpec
) -> nn.ModuleList:
    """Build a 1x1 convolution C_S -> C_T for each level, or identities if C_S equals C_T."""
    if student_spec.channels == teacher_spec.channels:
        return nn.ModuleList(nn.Identity() for _ in levels)
    return adapters(levels, student_spec, teacher_spec)


def covered_cells(boxes: torch.Tensor, stride: int, size: Sequence[int]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Find the rows and columns of a map that a box covers, also in part. A box covers at least one row and column.

    For example, on 1 x 4 cells of 8 pixels, a box from x = 7 to x = 17 covers the first three columns:

        >>> rows, columns = covered_cells(torch.tensor([[7.0, 0.0, 17.0, 8.0]]), stride=8, size=(1, 4))
        >>> columns
        tensor([[ True,  True,  True, False]])

    Args:
        boxes: (G, 4) xyxy in pixels.
        stride: pixels per cell.
        size: (H, W).

    Returns:
        rows (G, H) and columns (G, W), bool. Box g covers cell (y, x) if rows[g, y] and columns[g, x] are true.
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
    """Sum squared errors over the cells in the masks, over channels and over levels.

    Args:
        student, teacher: by level, (B, C, H, W).
        masks: by level, (B, H, W), bool.

    Returns:
        two scalars: the sum, and the number of cells in the masks.
    """
    errors = [
        ((student_map - teacher_map) ** 2 * mask[:, None]).sum()
        for student_map, teacher_map, mask in zip(student, teacher, masks)
    ]
    return torch.stack(errors).sum(), torch.stack([mask.sum() for mask in masks]).sum()
