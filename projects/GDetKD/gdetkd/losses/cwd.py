"""Channel-wise distillation, CWD: Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense
Prediction", ICCV 2021, https://arxiv.org/abs/2011.13256.

Shapes: B images, C channels, (H, W) the cells of a level.
"""

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, sum_of_zeros
from .maps import MapLoss, adapters_where_widths_differ


def channel_wise_distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compare, channel by channel, where the maps of student and teacher are large (section 3 of the paper).

    A softmax over the H W locations turns a channel into a distribution. The loss is the Kullback-Leibler divergence of
    the student's distribution from the teacher's, times temperature squared.

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)
        temperature: temperature of the softmax, positive.

    Returns:
        mean over B and C; 0 for empty maps.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    student_log, teacher_log = (torch.log_softmax(maps.flatten(2) / temperature, dim=2) for maps in (student, teacher))
    return temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(dim=2).mean()


@DISTILL_LOSS_REGISTRY.register()
class CWD(MapLoss):
    """Sum `channel_wise_distillation` over the common levels.

    The module has a 1x1 adapter for each level if the widths of the pyramids differ.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the temperature is not positive.
    """

    default_weight = 10.0  # source: MMRazor's configs for detectors with pyramids

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Temperature of the softmax over locations, positive. Source: MMRazor.
        node.TEMPERATURE = 1.0

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.temperature = cfg.DISTILL.CWD.TEMPERATURE
        if self.temperature <= 0:
            raise GDetKDError(f"DISTILL.CWD.TEMPERATURE is {self.temperature}. Set it to a positive number.")
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return sum(channel_wise_distillation(*pair, self.temperature) for pair in self.maps(student, teacher))
