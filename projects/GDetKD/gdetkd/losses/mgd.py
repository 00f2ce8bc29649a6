"""Masked generative distillation: Yang, Li, Shao, Shi, Yuan and Yuan, "Masked Generative Distillation", ECCV 2022."""

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
    """How far what is generated from a part of the student's map is from the teacher's whole map (section 3).

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)
        visible: (B, 1, H, W), 1 where the student's map is shown, 0 where it is masked.
        generate: (B, C, H, W) -> (B, C, H, W)

    Returns:
        squared errors summed over C, H, W, mean over B; 0 where there is nothing.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    return ((generate(student * visible) - teacher) ** 2).sum() / len(student)


@DISTILL_LOSS_REGISTRY.register()
class MGD(MapLoss):
    """`masked_generation`, times alpha, summed over the levels that both have, each with a mask of its own.

    Owns the generation block, two 3x3 convolutions, of each level, and 1x1 adapters where widths differ. Masks are
    drawn from the global generator, whose state a checkpoint keeps.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the masked share is none.
    """

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # By the student's family, from the authors: the factor on the term, and the share of the student's cells that
        # is masked.
        node.TWO_STAGE = CfgNode(dict(ALPHA=5e-7, MASK_RATIO=0.45))
        node.ANCHOR_BASED = CfgNode(dict(ALPHA=2e-5, MASK_RATIO=0.65))
        node.ANCHOR_FREE = CfgNode(dict(ALPHA=2e-5, MASK_RATIO=0.65))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        config = cfg.DISTILL.MGD[student_spec.family]
        self.alpha, self.mask_ratio = config.ALPHA, config.MASK_RATIO
        if not 0 <= self.mask_ratio < 1:
            raise GDetKDError(
                f"DISTILL.MGD.{student_spec.family}.MASK_RATIO is a share of cells, in [0, 1), not {self.mask_ratio}."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)
        self.generate = nn.ModuleList(_generation_block(teacher_spec.channels) for _ in self.levels)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        terms = []
        for adapter, generate, (ours, its) in zip(self.adapters, self.generate, self.maps(student, teacher)):
            visible = torch.rand_like(its[:, :1]) >= self.mask_ratio
            terms.append(masked_generation(adapter(ours), its, visible, generate))
        return self.alpha * sum(terms)


def _generation_block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
