"""Masked generative distillation, MGD: Yang, Li, Shao, Shi, Yuan and Yuan, "Masked Generative Distillation", ECCV 2022,
https://arxiv.org/abs/2205.01529.

Shapes: B images, C channels, (H, W) the cells of a level.
"""

from typing import Callable

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, sum_of_zeros
from .maps import MapLoss, adapters_where_widths_differ


def masked_generation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    visible: torch.Tensor,
    generate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Generate the teacher's whole map from the visible cells of the student's map, and compare (section 3).

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)
        visible: (B, 1, H, W), 1 in visible cells, 0 in masked cells.
        generate: generation block, (B, C, H, W) -> (B, C, H, W).

    Returns:
        squared errors summed over C, H, W, mean over B; 0 for empty maps.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    return ((generate(student * visible) - teacher) ** 2).sum() / len(student)


@DISTILL_LOSS_REGISTRY.register()
class MGD(MapLoss):
    """Sum `masked_generation` over the common levels, times alpha. Every level has its own random mask.

    The module has a generation block of two 3x3 convolutions for each level. It has a 1x1 adapter for each level if the
    widths of the pyramids differ. Masks are drawn from torch's global generator, whose state a checkpoint keeps.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the mask ratio is out of range.
    """

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Values by the student's family. Source: the authors. ALPHA is the factor on the term. MASK_RATIO is the share
        # of the student's cells that are masked.
        node.TWO_STAGE = CfgNode(dict(ALPHA=5e-7, MASK_RATIO=0.45))
        node.ANCHOR_BASED = CfgNode(dict(ALPHA=2e-5, MASK_RATIO=0.65))
        node.ANCHOR_FREE = CfgNode(dict(ALPHA=2e-5, MASK_RATIO=0.65))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        config = cfg.DISTILL.MGD[student_spec.family]
        self.alpha, self.mask_ratio = config.ALPHA, config.MASK_RATIO
        if not 0 <= self.mask_ratio < 1:
            raise GDetKDError(
                f"DISTILL.MGD.{student_spec.family}.MASK_RATIO is {self.mask_ratio}. It is a share of cells: set it to "
                "at least 0 and less than 1."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)
        self.generate = nn.ModuleList(_generation_block(teacher_spec.channels) for _ in self.levels)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        terms = []
        for generate, (student_map, teacher_map) in zip(self.generate, self.maps(student, teacher)):
            visible = torch.rand_like(teacher_map[:, :1]) >= self.mask_ratio
            terms.append(masked_generation(student_map, teacher_map, visible, generate))
        return self.alpha * sum(terms)


def _generation_block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
