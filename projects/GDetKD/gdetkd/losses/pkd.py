"""PKD: Cao, Zhang, Gao, Cheng, Cheng and Zhang, "PKD: General Distillation Framework for Object Detectors via Pearson
Correlation Coefficient", NeurIPS 2022, https://arxiv.org/abs/2207.02039.

Shapes: B images, C channels, (H, W) the cells of a level.
"""

import torch
from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY, sum_of_zeros
from .maps import MapLoss, adapters_where_widths_differ

# A channel counts as constant up to this standard deviation. The authors add this number to every deviation.
CONSTANT = 1e-6


def standardize(maps: torch.Tensor) -> torch.Tensor:
    """Give each channel of maps (B, C, H, W) zero mean and unit variance over images and locations.

    A constant channel becomes 0.
    """
    centred = maps - maps.mean(dim=(0, 2, 3), keepdim=True)
    variance = (centred**2).mean(dim=(0, 2, 3), keepdim=True)
    # Division by a tiny deviation would give a constant channel a gradient in the millions.
    return centred / torch.where(variance > CONSTANT**2, variance, torch.ones_like(variance)).sqrt()


def pearson_imitation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return 1 - r, where r is Pearson's correlation of a channel over images and locations (section 3).

    1 - r equals half the mean squared error of the standardised maps. For example, maps that differ by a scale and an
    offset give 0, and opposite maps give 2:

        >>> student = torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]])
        >>> pearson_imitation(student, 3 * student + 5), pearson_imitation(student, -student)
        (tensor(0.), tensor(2.))

    Args:
        student, teacher: (B, C, H, W)

    Returns:
        mean over C; 0 for empty maps.
    """
    if student.numel() == 0:
        return sum_of_zeros([student, teacher])
    return ((standardize(student) - standardize(teacher)) ** 2).mean() / 2


@DISTILL_LOSS_REGISTRY.register()
class PKD(MapLoss):
    """Sum `pearson_imitation` over the common levels.

    By default the module has no parameters. With DISTILL.PKD.ALIGN it has a 1x1 adapter for each level if the widths of
    the pyramids differ.

    Raises:
        GDetKDError: the pyramids have no stride in common, or their widths differ without DISTILL.PKD.ALIGN.
    """

    default_weight = 6.0  # source: the authors; they use 10 between dense detectors

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Use 1x1 adapters if the widths of the pyramids differ. If False, different widths are an error.
        # Source: our choice.
        node.ALIGN = False

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        if student_spec.channels != teacher_spec.channels and not cfg.DISTILL.PKD.ALIGN:
            raise GDetKDError(
                f"PKD compares pyramids channel by channel, but the student has {student_spec.channels} channels and "
                f"the teacher {teacher_spec.channels}. Set MODEL.FPN.OUT_CHANNELS to {teacher_spec.channels}, or set "
                "DISTILL.PKD.ALIGN to True to add adapters, which the paper does not use."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return sum(pearson_imitation(*pair) for pair in self.maps(student, teacher))
