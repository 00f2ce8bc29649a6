"""The meta-architecture: a plain Detectron2 student, and a teacher that looks at the same regions."""

from typing import Any, Collection, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from .config import plain_config
from .data.class_names import class_names
from .detectors import build_adapter
from .errors import GDetKDError
from .losses import DistillLoss, build_losses
from .recorder import Recorder
from .structures import DetectorOutputs, with_class_names
from .teacher import FrozenTeacher


@META_ARCH_REGISTRY.register()
class GDetKD(nn.Module):
    """In training, the student's own losses and the *unweighted* distillation terms; else the plain student.

    The trainer weights the terms. `student` is the plain detector, and its state dict is what a checkpoint calls
    `model`; `losses` holds what distillation learns beside it. The teacher is no submodule.

    Args:
        cfg: with MODEL.META_ARCHITECTURE "GDetKD".
        teacher: one that is loaded already, of the same config but for the losses; None: the config's is loaded.

    Raises:
        GDetKDError: teacher, student and losses do not fit together.
    """

    def __init__(self, cfg: CfgNode, teacher: Optional[FrozenTeacher] = None) -> None:
        super().__init__()
        if cfg.DISTILL.STUDENT_META_ARCHITECTURE == "GDetKD":
            raise GDetKDError('DISTILL.STUDENT_META_ARCHITECTURE is the plain student\'s, such as "GeneralizedRCNN".')
        self.student: nn.Module = build_model(plain_config(cfg))
        self.losses = nn.ModuleDict()
        self.teacher: Optional[FrozenTeacher] = None
        # What follows draws random numbers that a plain run does not; the student's run must not see them.
        with torch.random.fork_rng(devices=[]):
            if cfg.DISTILL.LOSSES or cfg.DISTILL.HEAD_TRANSFER or cfg.DISTILL.EVAL_TEACHER:
                self.teacher = teacher or FrozenTeacher(cfg)
            if cfg.DISTILL.LOSSES:
                self.adapter = build_adapter(self.student, "student", cfg)
                spec = with_class_names(self.adapter.spec, class_names(cfg))
                self.losses = build_losses(cfg, spec, self.teacher.spec)
        self._needs = frozenset().union(*(loss.needs for loss in self.losses.values()))
        if self.losses:
            self.adapter.needs = self._needs
            self.adapter.stages_compared = min(spec.num_stages, self.teacher.spec.num_stages)
        self._to_compute: List[str] = []

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def level_chooser(self) -> Optional[DistillLoss]:
        """Return the first loss that chooses among the student's levels, or None."""
        return next((loss for loss in self.losses.values() if loss.chooses_levels), None)

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """Detectron2's interface: a dict of losses in training, a list of predictions in evaluation."""
        # Forward passes of training without gradients are PreciseBN's, which is about the student alone.
        if not self.training or not self.losses or not torch.is_grad_enabled():
            return self.student(batched_inputs)
        self._to_compute = list(self.losses)
        with Recorder(self.adapter.points()) as calls:
            losses = self.student(batched_inputs)
        student = self.adapter.observe(calls, batched_inputs)
        student.gt_boxes = [inputs["instances"].gt_boxes.to(self.device) for inputs in batched_inputs]
        later_regions = [stage.regions for stage in student.later_stages]
        teacher = self.teacher.look(batched_inputs, student.regions, self._needs, later_regions)
        _check_filled(self._needs, student, teacher)
        for name, loss in self.losses.items():
            self._to_compute.remove(name)
            losses[term_name(name)] = loss(student, teacher)
        return losses

    def join_exchanges(self) -> None:
        """Take part in the exchanges of the losses that a failed forward pass did not reach."""
        for name in self._to_compute:
            self.losses[name].join_exchange()
        self._to_compute = []


def _check_filled(needs: Collection[str], student: DetectorOutputs, teacher: DetectorOutputs) -> None:
    lacking = [name for name in needs if getattr(student, name, None) is None and getattr(teacher, name, None) is None]
    if lacking:
        raise GDetKDError(
            f"A loss of DISTILL.LOSSES needs {', '.join(sorted(lacking))} of `DetectorOutputs`, which the adapters of "
            "these detectors do not fill. Fill it in `look` or `observe`, or take the loss out."
        )


def term_name(loss: str) -> str:
    """The key of a distillation term among the losses: Detectron2 has a "loss_cls" of its own."""
    return f"loss_distill_{loss.lower()}"
