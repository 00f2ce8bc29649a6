"""PKD: Cao, Zhang, Gao, Cheng, Cheng and Zhang, "PKD: General Distillation Framework for Object Detectors via Pearson
Correlation Coefficient", NeurIPS 2022."""

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, sum_of_zeros
from .maps import MapLoss, adapters_where_widths_differ

# Standard deviation up to which a channel counts as constant; the authors add as much to each.
CONSTANT = 1e-6


def standardize(maps: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance of each channel over images and locations; (B, C, H, W). A constant channel is 0."""
    centred = maps - maps.mean(dim=(0, 2, 3), keepdim=True)
    variance = (centred**2).mean(dim=(0, 2, 3), keepdim=True)
    # Dividing by next to nothing would send a constant channel a gradient in the millions.
    return centred / torch.where(variance > CONSTANT**2, variance, torch.ones_like(variance)).sqrt()


def pearson_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - r of each channel over images and locations (section 3), as half the squared error of standardised maps.

    Args:
        student, teacher: (B, C, H, W)

    Returns:
        mean over C; 0 where there is nothing.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    return ((standardize(student) - standardize(teacher)) ** 2).mean() / 2


@DISTILL_LOSS_REGISTRY.register()
class PKD(MapLoss):
    """`pearson_imitation`, summed over the levels that both have. Owns nothing, or 1x1 adapters where it is asked to.

    Raises:
        GDetKDError: the pyramids have no stride in common, or other widths and no adapters are asked for.
    """

    default_weight = 6.0  # source: the authors; they take 10 between dense detectors

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Use 1x1 adapters where the widths of the pyramids differ, which is an error without. Source: ours.
        node.ALIGN = False

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        if student_spec.channels != teacher_spec.channels and not cfg.DISTILL.PKD.ALIGN:
            raise GDetKDError(
                f"PKD compares pyramids channel by channel, and the student's has {student_spec.channels} channels and "
                f"the teacher's {teacher_spec.channels}. Give the student MODEL.FPN.OUT_CHANNELS "
                f"{teacher_spec.channels}, or set DISTILL.PKD.ALIGN True for adapters, which the authors do without."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        pairs = zip(self.adapters, self.maps(student, teacher))
        return sum(pearson_imitation(adapter(ours), its) for adapter, (ours, its) in pairs)
