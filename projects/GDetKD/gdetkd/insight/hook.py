"""Show what distillation does while it trains (DISTILL.INSIGHT.PERIOD)."""

import logging
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..distiller import GDetKD
from ..engine.gradients import term_gradients
from ..engine.schedule import LossSchedule
from ..random_state import random_state
from .page import write_page
from .probe import Probe, load_probe
from .records import RecordFile, make_record
from .references import References, look_at_references
from .run import FinishedRun

logger = logging.getLogger(__name__)


class Insight(HookBase):
    """Write a record, TensorBoard's figures and the page every DISTILL.INSIGHT.PERIOD iterations.

    The hook also writes before the first iteration and after the last. It does not change the training: on a CPU the
    results are bit-identical. It must run before the hook that writes metrics, and `LastPage` after that hook.

    Args:
        cfg: the run's config.
        distiller: the distiller, which has losses.
        schedule: the schedule that weights the terms.

    Raises:
        GDetKDError: DATASETS.TEST has no labelled image, or DISTILL.INSIGHT.BASELINE is not a finished run.
    """

    def __init__(self, cfg: CfgNode, distiller: GDetKD, schedule: LossSchedule) -> None:
        self._cfg = cfg
        self._period = cfg.DISTILL.INSIGHT.PERIOD
        self._distiller = distiller
        self._schedule = schedule
        self._parameters = _watched_parameters(distiller.student)
        self._gradients: Optional[Dict[str, Any]] = None
        self._probe: Optional[Probe] = None
        self._baseline: Optional[FinishedRun] = None
        self._references: Optional[References] = None
        if comm.is_main_process():
            self._probe = load_probe(cfg, distiller.teacher)
            self._baseline = FinishedRun(cfg.DISTILL.INSIGHT.BASELINE) if cfg.DISTILL.INSIGHT.BASELINE else None
            self._file = RecordFile(cfg.OUTPUT_DIR)

    def attach(self, model: nn.Module) -> None:
        """Watch the losses that `model` returns. Call this after the schedule is attached, which weights the losses."""
        model.register_forward_hook(self._look_at_losses)

    def _is_due(self, iterations: int) -> bool:
        return iterations % self._period == 0 or iterations == self.trainer.max_iter

    def _look_at_losses(self, model: nn.Module, inputs: Any, losses: Dict[str, torch.Tensor]) -> None:
        # Detectron2 estimates BatchNorm statistics (TEST.PRECISE_BN) with forward passes that have no gradient.
        if not model.training or not torch.is_grad_enabled() or not self._is_due(self.trainer.iter + 1):
            return
        if not self._distiller.distils:
            return
        # Every process takes part, because the backward pass of SyncBN waits for all of them.
        self._gradients = term_gradients(losses, self._schedule.terms, self._parameters, self.trainer.loss_scale)

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        with random_state((0,)):
            self._references = look_at_references(self._distiller.teacher, self._probe, self._baseline)
        done = self.trainer.start_iter
        self._file.start_at(done)
        # A run that was killed after its checkpoint and before its record makes the record on resume.
        if self._is_due(done) and all(record["iterations"] != done for record in self._file.read()):
            self._record(done)

    def after_step(self) -> None:
        iterations = self.trainer.iter + 1
        if comm.is_main_process() and self._is_due(iterations):
            self._record(iterations)
            self.write_page()

    def _record(self, iterations: int) -> None:
        with random_state((0,)):
            record = make_record(self._distiller, self._probe, iterations)
        record["gradients"], self._gradients = self._gradients, None
        for name in ("tau", "correlation_gap"):
            if record.get(name) is not None:
                self.trainer.storage.put_scalar(f"insight/{name}", record[name], smoothing_hint=False)
        for name, gradient in (record["gradients"] or {}).items():
            self.trainer.storage.put_scalar(f"gradient/{name}", gradient["norm"], smoothing_hint=False)
        try:
            self._file.add(record)
        except OSError as e:
            logger.error(
                "A record of the distillation could not be written to %s (%s). The training goes on without it.",
                self._file.folder,
                e.strerror or e,
            )

    def write_page(self) -> None:
        """Write the page, and put its pictures into TensorBoard."""
        try:
            with random_state((0,)):
                images = write_page(self._file, self._cfg, self._distiller.student, self._probe, self._references)
        except Exception:  # an error in a figure must not end the training
            logger.exception(
                "The page of the distillation could not be written to %s. The training goes on.", self._file.folder
            )
            return
        for name, image in images.items():
            self.trainer.storage.put_image(f"insight/{name}", image)


class LastPage(HookBase):
    """Write the page once more when the training has ended, with the last evaluation."""

    def __init__(self, insight: Insight) -> None:
        self._insight = insight

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._insight.write_page()


def _watched_parameters(student: nn.Module) -> List[nn.Parameter]:
    """Return the trainable parameters of the backbone, which every term reaches. If it is frozen, return all."""
    backbone = [p for p in getattr(student, "backbone", student).parameters() if p.requires_grad]
    return backbone or [p for p in student.parameters() if p.requires_grad]
