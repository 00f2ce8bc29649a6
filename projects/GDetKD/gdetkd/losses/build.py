"""The registry of distillation losses and what a loss is."""

from typing import Any, ClassVar, Dict, FrozenSet, Iterable, List

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """
Distillation losses by the name that DISTILL.LOSSES uses. Each is a subclass of `DistillLoss`, called with
`(cfg, student_spec, teacher_spec)`, both `gdetkd.structures.DetectorSpec`.
"""


class DistillLoss(nn.Module):
    """One term: from what student and teacher show of the same regions to an unweighted scalar.

    It runs in float32 (or more) whatever autocast says, and gives every parameter of its own a gradient on every
    step, also when there is no region.

    Attributes:
        needs: names of the fields of `DetectorOutputs` that it reads, beside the pyramid and the ground truth. What no
            loss names is not computed.
    """

    needs: ClassVar[FrozenSet[str]] = frozenset()
    # Whether the loss chooses among the student's levels. Then it has `level_attention`, and its temperature `tau`.
    chooses_levels: ClassVar[bool] = False
    # Default of DISTILL.<name>.WEIGHT, the factor on the term in the total loss.
    default_weight: ClassVar[float] = 1.0
    # Names of this module's own parameters that weight decay must leave alone, such as the logarithm of a temperature.
    without_decay: ClassVar[FrozenSet[str]] = frozenset()

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        """Add the loss's own keys and their defaults to the config node DISTILL.<name>, in place.

        WEIGHT and WARMUP_ITERS are there already.
        """

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """
        Args:
            student, teacher: what the two detectors show of the same images and regions.

        Returns:
            scalar
        """
        with torch.autocast(student.device.type, enabled=False):
            loss = self.compute(student, teacher)
            # With no region a convolution's bias, say, would be left without a gradient, which hangs DDP.
            return loss + sum_of_zeros(self.parameters())

    def join_exchange(self) -> None:
        """Take part in what `compute` exchanges with other processes, on a process that has nothing to compare.

        It is called in place of `forward` where the student's forward pass failed: the other processes wait. A loss
        whose `compute` exchanges something has to override it, and to exchange before anything that can fail.
        """

    def undecayed(self) -> List[nn.Parameter]:
        """Return the parameters that `without_decay` names."""
        return [self.get_parameter(name) for name in sorted(self.without_decay)]

    def before_step(self) -> None:
        """Make final what earlier steps changed in buffers. The trainer calls this before each step."""

    def undo_step(self) -> None:
        """Drop what the step changed in buffers since `before_step`, because the step is left out."""

    def fill(self) -> None:
        """Fill buffers that grow at the start of a training, such as a queue, to measure the cost of later steps."""

    def scalars(self) -> Dict[str, float]:
        """Return values to log beside the term, by name. The trainer calls this every 20 steps.

        A loss can log a warning here if it has reached a state that it does not leave by itself.
        """
        return {}

    def level_attention(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """Return (N, L): how much the loss attends to each of the student's L levels, for each of N regions.

        A loss with `chooses_levels` implements this. `teacher` has `pooled`.
        """
        raise NotImplementedError

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """Return the term. Autocast is off here, and the loss converts half-precision inputs itself."""
        raise NotImplementedError


def sum_of_zeros(tensors: Iterable[torch.Tensor]) -> Any:
    """A zero that each tensor has a (zero) gradient of."""
    return sum((tensor.sum() * 0.0 for tensor in tensors), 0.0)


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of two tensors of one shape; 0, with a gradient path, where there is nothing to compare."""
    return F.mse_loss(student, teacher) if student.numel() else sum_of_zeros([student, teacher])


def build_losses(cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> nn.ModuleDict:
    """The losses that DISTILL.LOSSES names, in its order.

    Raises:
        GDetKDError: a name is unknown or stands twice, or a loss cannot be had for this pair of detectors.
    """
    losses = nn.ModuleDict()
    for name in cfg.DISTILL.LOSSES:
        if name not in DISTILL_LOSS_REGISTRY:
            known = ", ".join(key for key, _ in DISTILL_LOSS_REGISTRY)
            raise GDetKDError(f"DISTILL.LOSSES names {name!r}, which is no loss. There are: {known}.")
        if name in losses:
            raise GDetKDError(f"DISTILL.LOSSES names {name!r} twice. Give DISTILL.{name}.WEIGHT instead.")
        losses[name] = DISTILL_LOSS_REGISTRY.get(name)(cfg, student_spec, teacher_spec)
    return losses
