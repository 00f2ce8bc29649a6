"""Check the losses of every step before the optimizer takes it."""

import json
import logging
import math
import os
from typing import Any, Dict, List, Tuple

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..files import written_whole
from ..random_state import get_random_state
from .exchange import on_any_process
from .forward_guard import ForwardGuard, NonFiniteError
from .forward_state import ForwardState
from .hooks import RandomState
from .schedule import LossSchedule
from .stopping import StopRequest

logger = logging.getLogger(__name__)


class StepSkipped(Exception):
    """Ends a step before the optimizer's."""


class StepGuard(HookBase):
    """Stops a run, or leaves a step out, before a loss that is not finite reaches a parameter.

    Every process comes to the same decision. The hook must come after the other hooks of a step, so that it sees the
    state before each step.

    Args:
        tolerated: steps that may be left out over the whole run.
        random_state: the hook that keeps the random states for the checkpoint.
        request: the exchange before each optimizer step also tells every process whether to stop.
    """

    def __init__(self, tolerated: int, random_state: RandomState, request: StopRequest) -> None:
        self._tolerated = tolerated
        self._random_state = random_state
        self._request = request
        self._skipped = 0
        self._files: List[str] = []
        self._random_before: Dict[str, Any] = {}
        self._model: ForwardGuard
        self._state: ForwardState

    def attach(self, model: ForwardGuard) -> Any:
        """Watch the forward passes of `model` in training. Return the handle that undoes this."""
        self._model, self._state = model, ForwardState(model)
        return model.register_forward_pre_hook(self._note_batch)

    def _note_batch(self, model: nn.Module, inputs: Tuple[Any, ...]) -> None:
        if model.training:
            self._files = [str(sample.get("file_name", "no file name")) for sample in inputs[0]]

    def before_step(self) -> None:
        self._state.save()
        self._random_before = get_random_state()

    def check(self, losses: Dict[str, torch.Tensor]) -> None:
        """Look at the losses between the backward pass and the optimizer's step, where Detectron2 fetches them anyway.

        Raises:
            StepSkipped: a loss of some process is not finite, and that is tolerated.
            NonFiniteError: a loss of some process is not finite, and that is not tolerated.
        """
        values = dict(zip(losses, torch.stack([loss.detach().float().sum() for loss in losses.values()]).tolist()))
        terms = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        if self._model.failure:
            terms = {"the forward pass": f"not finite ({self._model.failure})"}
        some_not_finite, self._request.is_agreed = on_any_process(bool(terms), self._request.is_asked)
        if some_not_finite:
            self._skip_or_stop(comm.all_gather({"terms": terms, "files": self._files}))

    def _skip_or_stop(self, found: List[Dict[str, Any]]) -> None:
        self._state.restore()
        message = self._message(found)
        if self._skipped < self._tolerated:
            self._skipped += 1
            logger.warning(
                "%s The step is left out: %d of the %d that DISTILL.SKIP_NONFINITE tolerates.",
                message,
                self._skipped,
                self._tolerated,
            )
            raise StepSkipped
        name = f"nonfinite_{self.trainer.iter:07d}"
        self._random_state.keep(self._random_before)
        if comm.is_main_process():
            self._write_report(name, found)
            self._save_before_step(name)
        comm.synchronize()  # or the error of another would make the launcher end the one that writes
        raise NonFiniteError(
            f"{message} The optimizer did not take that step. The batch's files are in {name}.json and the state "
            f"before the step in {name}.pth, in {self.trainer.cfg.OUTPUT_DIR}. Look at these images and at the weight "
            "of that term, let DISTILL.SKIP_NONFINITE leave such steps out, or start anew with a lower "
            "SOLVER.BASE_LR: a run that is resumed keeps its own."
        )

    def _save_before_step(self, name: str) -> None:
        """A checkpoint's iteration is the last that was done, and resuming takes the one after: this one, again."""
        self.trainer.iter -= 1
        try:
            self.trainer.checkpointer.save_aside(name, iteration=self.trainer.iter)
        finally:
            self.trainer.iter += 1

    def _write_report(self, name: str, found: List[Dict[str, Any]]) -> None:
        report = json.dumps({"iteration": self.trainer.iter, "processes": found}, indent=2)
        try:
            with written_whole(os.path.join(self.trainer.cfg.OUTPUT_DIR, f"{name}.json")) as file:
                file.write(report)
        except OSError as e:
            logger.error("%s.json could not be written (%s); it would say: %s", name, e.strerror or e, report)

    def _message(self, found: List[Dict[str, Any]]) -> str:
        of_ranks = {rank: of_rank for rank, of_rank in enumerate(found) if of_rank["terms"]}
        parts = [f"{name} is {value}" for of_rank in of_ranks.values() for name, value in of_rank["terms"].items()]
        files = [name for of_rank in of_ranks.values() for name in of_rank["files"]]
        return (
            f"At iteration {self.trainer.iter} {'; '.join(dict.fromkeys(parts))} (process "
            f"{', '.join(map(str, of_ranks))}; images {', '.join(files)})."
        )

    def state_dict(self) -> Dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._skipped = state["skipped"]


class _Guarded:
    """Detectron2's step, looked at by a `StepGuard` before the optimizer's part; and the terms' values are logged."""

    guard: StepGuard
    schedule: LossSchedule

    def run_step(self) -> None:
        try:
            super().run_step()
        except StepSkipped:
            self.optimizer.zero_grad()

    def _write_metrics(self, loss_dict: Dict[str, torch.Tensor], data_time: float, *args: Any, **kwargs: Any) -> None:
        self.guard.check(loss_dict)
        self.schedule.log()
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)


class GuardedTrainer(_Guarded, SimpleTrainer):
    pass


class GuardedAMPTrainer(_Guarded, AMPTrainer):
    pass
