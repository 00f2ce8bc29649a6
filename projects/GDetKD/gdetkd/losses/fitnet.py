"""Whole-map imitation: the hints of Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, on each level."""

import torch
from detectron2.config import CfgNode

from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, mean_squared_error
from .maps import MapLoss, adapters


def whole_map_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The squared error of FitNets' equation 3, as a mean instead of half the sum.

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)

    Returns:
        mean over B, C, H, W; 0 where there is nothing.
    """
    return mean_squared_error(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
class FITNET(MapLoss):
    """`whole_map_imitation`, mean over the levels that both have. Owns a 1x1 adapter, FitNets' regressor, for each.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """

    default_weight = 1.0  # source: ours; FitNets are classifiers

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.adapters = adapters(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        pairs = zip(self.adapters, self.maps(student, teacher))
        return torch.stack([whole_map_imitation(adapter(ours), its) for adapter, (ours, its) in pairs]).mean()
