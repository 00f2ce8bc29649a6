"""The meta-architecture GDetKD: a plain Detectron2 student, and a teacher that looks at the same regions."""

from typing import Any, Collection, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from .config import plain_config
from .data.class_names import class_names
from .detectors import build_adapter
from .device import images_on_device, objects_on_device
from .errors import GDetKDError
from .losses import DistillLoss, build_losses
from .recorder import Recorder
from .structures import DetectorOutputs, with_class_names
from .teacher import FrozenTeacher


@META_ARCH_REGISTRY.register()
class GDetKD(nn.Module):
    """Distil a student. In training, return the student's own losses and the unweighted distillation terms.

    In evaluation, this is the plain student. The trainer weights the terms. The teacher is no submodule.

    Args:
        cfg: a config with MODEL.META_ARCHITECTURE "GDetKD".
        teacher: a loaded teacher of the same config, to save loading it again. None: load the teacher of `cfg`. The
            losses in the two configs may differ.

    Attributes:
        student: the plain detector. A checkpoint holds its state dict under `model`.
        losses: the losses by name, with the parameters that distillation learns beside the student.
        teacher: the frozen teacher, or None if the config needs no teacher.

    Raises:
        GDetKDError: teacher, student and losses do not fit together.
    """

    def __init__(self, cfg: CfgNode, teacher: Optional[FrozenTeacher] = None) -> None:
        super().__init__()
        if cfg.DISTILL.STUDENT_META_ARCHITECTURE == "GDetKD":
            raise GDetKDError(
                'DISTILL.STUDENT_META_ARCHITECTURE is "GDetKD". Set it to the architecture of the plain student, for '
                'example "GeneralizedRCNN".'
            )
        self.student: nn.Module = build_model(plain_config(cfg))
        self.losses = nn.ModuleDict()
        self.teacher: Optional[FrozenTeacher] = None
        # The code below draws random numbers. The student's run must draw the same numbers as a plain run.
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
        """Return a dict of losses in training, or a list of predictions in evaluation, as Detectron2 expects."""
        # A training pass without gradients comes from PreciseBN, which concerns the student alone.
        if not self.training or not self.losses or not torch.is_grad_enabled():
            return self.student(batched_inputs)
        self._to_compute = list(self.losses)
        batch = images_on_device(batched_inputs, self.device)
        features = self.teacher.extract(batch)  # first, because a GPU can work on it while the student starts
        with Recorder(self.adapter.points()) as calls:
            losses = self.student(batch)
        batch = objects_on_device(batch, self.device)
        student = self.adapter.observe(calls, batch)
        student.gt_boxes = [inputs["instances"].gt_boxes for inputs in batch]
        later_regions = [stage.regions for stage in student.later_stages]
        teacher = self.teacher.look_at(features, student.regions, self._needs, later_regions)
        _check_filled(self._needs, student, teacher)
        for name, loss in self.losses.items():
            self._to_compute.remove(name)
            losses[term_name(name)] = loss(student, teacher)
        return losses

    def join_exchanges(self) -> None:
        """Take part in the collectives of the losses that a failed forward pass did not reach."""
        for name in self._to_compute:
            self.losses[name].join_exchange()
        self._to_compute = []


def _check_filled(needs: Collection[str], student: DetectorOutputs, teacher: DetectorOutputs) -> None:
    lacking = [name for name in needs if getattr(student, name, None) is None and getattr(teacher, name, None) is None]
    if lacking:
        raise GDetKDError(
            f"A loss of DISTILL.LOSSES needs {', '.join(sorted(lacking))} of `DetectorOutputs`, but the adapters of "
            "these detectors do not fill it. Fill it in `look` or `observe`, or take the loss out of DISTILL.LOSSES."
        )


def term_name(loss: str) -> str:
    """Return the key of a distillation term in the dict of losses. Detectron2 already uses the key "loss_cls"."""
    return f"loss_distill_{loss.lower()}"
