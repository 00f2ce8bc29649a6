"""The meta-architecture GDetKD: a plain Detectron2 student, and a teacher that looks at the same regions."""

from contextlib import ExitStack
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from .config import plain_config
from .data.class_names import class_names
from .data.unlabeled import doubtful_boxes, is_unlabeled, split_batch
from .detectors import DetectorAdapter, build_adapter
from .device import images_on_device, objects_on_device
from .errors import GDetKDError
from .losses import DistillLoss, build_losses
from .losses.build import sum_of_zeros
from .mixture import Mixture, joined, shared_pyramid
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
        adapter: reads the student. None if there are no losses and no unlabelled images: then this trains the plain
            student.
        mixture: joins the student's losses on images with and without labels.
        reads_regions_alone: whether the teacher's features are read in regions alone, by RoIAlign. The losses on whole
            maps read more, and so does the head of a dense teacher.
        distils: whether the next training step has distillation terms. The trainer sets it by DISTILL.UNTIL.

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
        self.adapter: Optional[DetectorAdapter] = None
        self.reads_regions_alone, self._needs = True, frozenset()
        # The code below draws random numbers. The student's run must draw the same numbers as a plain run.
        with torch.random.fork_rng(devices=[]):
            if cfg.DISTILL.LOSSES or cfg.DISTILL.HEAD_TRANSFER or cfg.DISTILL.EVAL_TEACHER:
                self.teacher = teacher or FrozenTeacher(cfg)
            if cfg.DISTILL.LOSSES or cfg.DATASETS.UNLABELED:
                self.adapter = build_adapter(self.student, "student", cfg)
            if cfg.DATASETS.UNLABELED and type(self.adapter).ignoring is DetectorAdapter.ignoring:
                self.adapter.ignoring([])  # raises an error
            if cfg.DISTILL.LOSSES:
                self._add_losses(cfg)
        self.mixture = Mixture(
            cfg.DISTILL.UNLABELED.WEIGHT, self.adapter.losses_are_means if self.adapter is not None else True
        )
        self.distils = True
        self._to_compute: List[str] = []

    def _add_losses(self, cfg: CfgNode) -> None:
        spec = with_class_names(self.adapter.spec, class_names(cfg))
        self.losses = build_losses(cfg, spec, self.teacher.spec)
        losses = self.losses.values()
        self.adapter.needs = self._needs = frozenset().union(*(loss.needs for loss in losses))
        self.adapter.stages_compared = min(spec.num_stages, self.teacher.spec.num_stages)
        self.reads_regions_alone = self.teacher.spec.dense is None and all(loss.reads_regions_alone for loss in losses)

    @property
    def terms(self) -> List[str]:
        """Return the names of the distillation terms of the next training step."""
        return [term_name(name) for name in self.losses] if self.distils else []

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
        if not self.training or self.adapter is None or not torch.is_grad_enabled():
            return self.student(batched_inputs)
        distils = self.distils and bool(self.losses)
        self._to_compute = list(self.losses) if distils else []
        if distils:
            batched_inputs = self.teacher.with_cache_keys(batched_inputs)
        parts = split_batch(images_on_device(batched_inputs, self.device))
        batch = [inputs for part in parts for inputs in part]
        if distils:
            # First: a GPU can work on it while the student starts.
            features = self.teacher.extract(batch, self.reads_regions_alone)
        losses, student = self._run_student(parts, distils)
        if not distils:
            return self._reaching_all_parameters(losses)
        later_regions = [stage.regions for stage in student.later_stages]
        teacher = self.teacher.look_at(features, student.regions, self._needs, later_regions)
        _check_filled(self._needs, student, teacher)
        for name, loss in self.losses.items():
            self._to_compute.remove(name)
            losses[term_name(name)] = loss(student, teacher)
        return losses

    def _run_student(
        self, parts: Sequence[List[Dict[str, Any]]], distils: bool
    ) -> Tuple[Dict[str, torch.Tensor], Optional[DetectorOutputs]]:
        """Return the student's own losses, and what the distillation terms read."""
        if len(parts) == 1:
            return self._record(parts[0], distils)
        with shared_pyramid(self.student, parts) as pyramid:
            losses, outputs = zip(*(self._record(part, distils) for part in parts))
        return self.mixture.join(parts, losses), joined(outputs, pyramid) if distils else None

    def _record(
        self, batch: List[Dict[str, Any]], distils: bool
    ) -> Tuple[Dict[str, torch.Tensor], Optional[DetectorOutputs]]:
        with ExitStack() as stack:
            if is_unlabeled(batch[0]):
                stack.enter_context(self.adapter.ignoring(doubtful_boxes(batch, self.device)))
            calls = stack.enter_context(Recorder(self.adapter.points()))
            losses = self.student(batch)
        if not distils:
            return losses, None
        batch = objects_on_device(batch, self.device)
        outputs = self.adapter.observe(calls, batch)
        outputs.gt_boxes = [inputs["instances"].gt_boxes for inputs in batch]
        return losses, outputs

    def _reaching_all_parameters(self, losses: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """Return the losses of a step without distillation, with a gradient of 0 for the parameters of the terms.

        Otherwise DDP would wait for these gradients.
        """
        first = next(iter(losses))
        return {**losses, first: losses[first] + sum_of_zeros(self.losses.parameters())}

    def fill_buffers(self) -> None:
        """Fill the losses' buffers that grow at the start of a training, to measure the cost of later steps."""
        for loss in self.losses.values():
            loss.fill()

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
