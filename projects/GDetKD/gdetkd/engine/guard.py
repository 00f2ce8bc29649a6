"""Find losses that are not finite, and leave out the step or stop the run."""

import json
import logging
import math
import os
from typing import Any, Dict, List, Mapping, Tuple

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..files import write_or_log
from ..random_state import get_random_state
from .forward_guard import ForwardGuard, NonFiniteError
from .forward_state import ForwardState
from .hooks import RandomState

logger = logging.getLogger(__name__)


class StepSkipped(Exception):
    """End a step before the optimizer changes a parameter."""


class StepGuard(HookBase):
    """Keep a loss that is not finite from reaching a parameter. `StepAgreement` asks the guard before each step.

    The hook must come after the other hooks of a step, so that it sees the state before each step.

    Args:
        tolerated: number of steps that may be left out over the whole run.
        random_state: the hook that keeps the random states for the checkpoint.
    """

    def __init__(self, tolerated: int, random_state: RandomState) -> None:
        self._tolerated = tolerated
        self._random_state = random_state
        self._skipped = 0
        self._files: List[str] = []
        self._random_before: Dict[str, Any] = {}
        self._model: ForwardGuard
        self._state: ForwardState

    def attach(self, model: ForwardGuard) -> None:
        """Watch the forward passes of `model` in training."""
        self._model, self._state = model, ForwardState(model)
        model.register_forward_pre_hook(self._note_batch)

    def _note_batch(self, model: nn.Module, inputs: Tuple[Any, ...]) -> None:
        if model.training:
            self._files = [str(sample.get("file_name", "no file name")) for sample in inputs[0]]

    def before_step(self) -> None:
        self._state.save()
        self._random_before = get_random_state()

    def find(self, losses: Mapping[str, float]) -> Dict[str, str]:
        """Return the losses of this process that are not finite, as text."""
        if self._model.failure:
            return {"the forward pass": f"not finite ({self._model.failure})"}
        return {name: str(value) for name, value in losses.items() if not math.isfinite(value)}

    def skip_or_stop(self, terms: Mapping[str, str]) -> None:
        """Undo the forward pass, and end the step or the run. All processes must call this together.

        Args:
            terms: what `find` returned on this process.

        Raises:
            StepSkipped: one more step may be left out.
            NonFiniteError: no more step may be left out. The state before the step is saved.
        """
        found = comm.all_gather({"terms": terms, "files": self._files})
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
        comm.synchronize()  # an error of another process would make the launcher end the process that writes
        raise NonFiniteError(
            f"{message} The optimizer did not take that step. {name}.json in {self.trainer.cfg.OUTPUT_DIR} lists the "
            f"files of the batch, and {name}.pth holds the state before the step. Check these images and the weight of "
            "that term, set DISTILL.SKIP_NONFINITE to leave out such steps, or start anew with a lower SOLVER.BASE_LR: "
            "a resumed run keeps its learning rate."
        )

    def _save_before_step(self, name: str) -> None:
        """Save the state so that a resumed run repeats this step. It starts after the iteration in the checkpoint."""
        self.trainer.iter -= 1
        try:
            self.trainer.checkpointer.save_aside(name, iteration=self.trainer.iter)
        finally:
            self.trainer.iter += 1

    def _write_report(self, name: str, found: List[Dict[str, Any]]) -> None:
        report = json.dumps({"iteration": self.trainer.iter, "processes": found}, indent=2)
        write_or_log(os.path.join(self.trainer.cfg.OUTPUT_DIR, f"{name}.json"), report, f"Its content: {report}")

    def _message(self, found: List[Dict[str, Any]]) -> str:
        broken = {rank: report for rank, report in enumerate(found) if report["terms"]}
        parts = [f"{name} is {value}" for report in broken.values() for name, value in report["terms"].items()]
        files = [name for report in broken.values() for name in report["files"]]
        return (
            f"At iteration {self.trainer.iter} {'; '.join(dict.fromkeys(parts))} (process "
            f"{', '.join(map(str, broken))}; images {', '.join(files)})."
        )

    def state_dict(self) -> Dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._skipped = state["skipped"]
