"""Channel-wise distillation: Shu, Liu, Gao, Yan and Shen, "Channel-wise Knowledge Distillation for Dense Prediction",
ICCV 2021."""

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, sum_of_zeros
from .maps import MapLoss, adapters_where_widths_differ


def channel_wise_distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence of each channel's distribution over locations (section 3).

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)
        temperature: of the softmax over H W, positive.

    Returns:
        temperature squared times the divergence from the teacher's distribution, mean over B and C; 0 where there is
        nothing.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    ours, its = (torch.log_softmax(each.flatten(2) / temperature, dim=2) for each in (student, teacher))
    return temperature**2 * (its.exp() * (its - ours)).sum(dim=2).mean()


@DISTILL_LOSS_REGISTRY.register()
class CWD(MapLoss):
    """`channel_wise_distillation`, summed over the levels that both have. Owns 1x1 adapters where widths differ.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the temperature is not positive.
    """

    default_weight = 10.0  # source: MMRazor, for pyramids of detectors

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Of the softmax over locations. Source: MMRazor.
        node.TEMPERATURE = 1.0

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.temperature = cfg.DISTILL.CWD.TEMPERATURE
        if self.temperature <= 0:
            raise GDetKDError(f"DISTILL.CWD.TEMPERATURE must be positive, not {self.temperature}.")
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        pairs = zip(self.adapters, self.maps(student, teacher))
        return sum(channel_wise_distillation(adapter(ours), its, self.temperature) for adapter, (ours, its) in pairs)
