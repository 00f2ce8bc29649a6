"""Whole-map imitation, FITNET: the hints of Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
https://arxiv.org/abs/1412.6550, on every level of a pyramid.

Shapes: B images, C channels, (H, W) the cells of a level.
"""

import torch
from detectron2.config import CfgNode

from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, mean_squared_error
from .maps import MapLoss, adapters


def whole_map_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compare whole maps by the mean squared error. FitNets' equation 3 has half the sum instead of the mean.

    Args:
        student: (B, C, H, W), adapted to the teacher's channels.
        teacher: (B, C, H, W)

    Returns:
        mean over B, C, H, W; 0 for empty maps.
    """
    return mean_squared_error(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
class FITNET(MapLoss):
    """Average `whole_map_imitation` over the common levels.

    The module has a 1x1 adapter for each level, which FitNets call a regressor.

    Raises:
        GDetKDError: the pyramids have no stride in common.
    """

    default_weight = 1.0  # source: our choice; FitNets are classifiers

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.adapters = adapters(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return torch.stack([whole_map_imitation(*pair) for pair in self.maps(student, teacher)]).mean()
