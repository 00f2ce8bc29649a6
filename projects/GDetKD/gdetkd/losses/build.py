"""The registry of distillation losses, and the base class of a loss."""

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
Distillation losses by the name that DISTILL.LOSSES uses. An entry is a subclass of `DistillLoss`. It is called with
`(cfg, student_spec, teacher_spec)`; both specs are `gdetkd.structures.DetectorSpec`.
"""


class DistillLoss(nn.Module):
    """Compute one distillation term: compare the outputs of student and teacher, and return an unweighted scalar.

    A loss runs in float32 (or float64) even under autocast. Every parameter of a loss gets a gradient at every step,
    even if the batch has no region.

    Attributes:
        needs: fields of `DetectorOutputs` that the loss reads, beside the pyramid and the ground truth. A field that no
            loss needs is not computed.
        chooses_levels: whether the loss weighs the student's levels against each other. If so, it implements
            `level_attention` and has a temperature `tau`.
        reads_regions_alone: whether the loss reads the teacher's features in regions, and not its whole maps. Then
            DISTILL.TEACHER.CACHE_MB can pad each image for itself.
        default_weight: default of DISTILL.<name>.WEIGHT, the factor on the term in the total loss.
        default_share: default of DISTILL.<name>.SHARE, the norm of the term's gradient that DISTILL.WEIGHTS "auto" aims
            at, in multiples of that of the student's own losses.
        without_decay: names of the module's parameters that get no weight decay, such as the logarithm of a
            temperature.
    """

    needs: ClassVar[FrozenSet[str]] = frozenset()
    chooses_levels: ClassVar[bool] = False
    reads_regions_alone: ClassVar[bool] = False
    default_weight: ClassVar[float] = 1.0
    default_share: ClassVar[float] = 1.0
    without_decay: ClassVar[FrozenSet[str]] = frozenset()

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        """Add the loss's own keys and their defaults to the config node DISTILL.<name>, in place.

        The node has WEIGHT, SHARE and WARMUP_ITERS already.
        """

    def forward(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """Return the term with autocast off, connected to every parameter of the loss.

        Args:
            student, teacher: outputs of the two detectors on the same images and regions.

        Returns:
            scalar
        """
        with torch.autocast(student.device.type, enabled=False):
            loss = self.compute(student, teacher)
            # Without a region, a parameter such as a convolution's bias would get no gradient, and DDP would hang.
            return loss + sum_of_zeros(self.parameters())

    def join_exchange(self) -> None:
        """Take part in the collectives of `compute`, on a process that has nothing to compare.

        The trainer calls this in place of `forward` if the student's forward pass failed, because the other processes
        wait. Override it if `compute` uses collectives. `compute` must run them before anything that can fail.
        """

    def undecayed(self) -> List[nn.Parameter]:
        """Return the parameters that `without_decay` names."""
        return [self.get_parameter(name) for name in sorted(self.without_decay)]

    def before_step(self) -> None:
        """Write the pending changes of buffers. The trainer calls this before each step."""

    def undo_step(self) -> None:
        """Drop the pending changes of buffers. The trainer calls this when it skips a step."""

    def fill(self) -> None:
        """Fill buffers that grow at the start of a training, such as a queue, to measure the cost of later steps."""

    def scalars(self) -> Dict[str, float]:
        """Return values to log beside the term, by name. The trainer calls this every 20 steps.

        A loss can log a warning here if it is stuck in a bad state.
        """
        return {}

    def level_attention(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """Return (N, L): the share of each of the student's L levels in the term, for each of N regions.

        A loss with `chooses_levels` implements this. `teacher` has `pooled`.
        """
        raise NotImplementedError

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        """Return the term. Autocast is off here. The loss converts half-precision inputs itself."""
        raise NotImplementedError


def sum_of_zeros(tensors: Iterable[torch.Tensor]) -> Any:
    """Return 0, with a zero gradient for each tensor."""
    return sum((tensor.sum() * 0.0 for tensor in tensors), 0.0)


def mean_squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of two tensors of one shape. For empty tensors, return 0 with a gradient path."""
    return F.mse_loss(student, teacher) if student.numel() else sum_of_zeros([student, teacher])


def build_losses(cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> nn.ModuleDict:
    """Build the losses that DISTILL.LOSSES names, in that order.

    Raises:
        GDetKDError: a name is unknown or occurs twice, or a loss cannot compare these two detectors.
    """
    losses = nn.ModuleDict()
    for name in cfg.DISTILL.LOSSES:
        if name not in DISTILL_LOSS_REGISTRY:
            known = ", ".join(key for key, _ in DISTILL_LOSS_REGISTRY)
            raise GDetKDError(f"DISTILL.LOSSES has the unknown loss {name!r}. Choose from: {known}.")
        if name in losses:
            raise GDetKDError(
                f"DISTILL.LOSSES has {name!r} twice. Name it once. To give it more weight, set DISTILL.{name}.WEIGHT."
            )
        losses[name] = DISTILL_LOSS_REGISTRY.get(name)(cfg, student_spec, teacher_spec)
    return losses
