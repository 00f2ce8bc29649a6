"""RoI imitation, ROIFI: compare a region's pooled features on the level that the box-size rule assigns to it.

Yao et al. ("G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482) use it as a baseline. For Faster R-CNN with a
ResNet-18 on COCO they report 36.4 AP with ROIFI and 36.7 AP with SGFI.

Shapes: B images, N regions, L student levels, C channels, (h, w) the pooled size.
"""

import logging
import math
from typing import Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import GDetKDError
from ..roi_align import pool_on_levels
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, mean_squared_error

logger = logging.getLogger(__name__)


def roi_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare pooled features (N, C, h, w) by the mean squared error; 0 for N = 0."""
    return mean_squared_error(student, teacher)


def nearest_levels(student_strides: Sequence[int], teacher_strides: Sequence[int]) -> Tuple[int, ...]:
    """Return, for each teacher level, the index of the student level of the same or the nearest stride.

    For example, a student that lacks the teacher's stride 4 uses stride 8 in its place:

        >>> nearest_levels(student_strides=[8, 16, 32], teacher_strides=[4, 8, 16, 32])
        (0, 0, 1, 2)

    The box-size rule does the same: it moves boxes that are too small or too large to the nearest level.
    """
    return tuple(
        min(range(len(student_strides)), key=lambda index: abs(math.log2(student_strides[index] / stride)))
        for stride in teacher_strides
    )


@DISTILL_LOSS_REGISTRY.register()
class ROIFI(DistillLoss):
    """Compare regions by `roi_imitation`, on the level that the teacher's box-size rule assigns.

    The module has a 1x1 adapter.

    Raises:
        GDetKDError: the sampling ratio is less than 1.
    """

    default_weight = 1.0  # source: our choice
    needs = frozenset({"pooled", "levels"})
    reads_regions_alone = True

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # RoIAlign samples per bin and axis on the student's pyramid. Source: our choice.
        node.SAMPLING_RATIO = 2

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        self.sampling_ratio = cfg.DISTILL.ROIFI.SAMPLING_RATIO
        if self.sampling_ratio < 1:
            raise GDetKDError(f"DISTILL.ROIFI.SAMPLING_RATIO is {self.sampling_ratio}. Set it to at least 1.")
        self.strides, self.size = list(student_spec.strides.values()), teacher_spec.pooled_size
        teacher_strides = list(teacher_spec.strides.values())
        self.student_level = nearest_levels(self.strides, teacher_strides)
        moved = [
            f"1/{stride} to 1/{self.strides[level]}"
            for stride, level in zip(teacher_strides, self.student_level)
            if stride not in self.strides
        ]
        if moved:
            logger.warning(
                "The student lacks levels of the teacher. ROIFI uses the nearest stride in their place: %s.",
                ", ".join(moved),
            )
        self.adapter = nn.Conv2d(student_spec.channels, teacher_spec.channels, kernel_size=1)
        self.register_buffer("level_map", torch.tensor(self.student_level), persistent=False)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        maps = list(student.pyramid.values())
        levels = self.level_map[teacher.levels]
        pooled = pool_on_levels(maps, self.strides, student.regions, levels, self.size, self.sampling_ratio)
        return roi_imitation(self.adapter(pooled), full_precision(teacher.pooled))
