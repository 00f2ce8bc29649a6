"""Run on resume the evaluation and the PreciseBN estimate that an earlier run missed."""

import logging
import os
from contextlib import contextmanager
from typing import Iterator, Optional

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..files import write_or_log
from .hooks import KeepBest, RandomState
from .patience import Patience
from .precise_bn import PreciseStatistics
from .stopping import EXIT_STOPPED, StopRequest

logger = logging.getLogger(__name__)

FINAL = "model_final.pth"


class EvaluationNote(EventWriter):
    """Note in a file how many iterations were done at the last evaluation.

    Detectron2 writes metrics every 20 iterations, so a kill can come between an evaluation and the writing of its
    metrics. This must stand after the writer of metrics.json. So an evaluation whose metrics a kill kept from the file
    is not noted, and is made again on resume.

    Args:
        output_dir: the folder of the file.
    """

    def __init__(self, output_dir: str) -> None:
        self._path = os.path.join(output_dir, "last_evaluation")
        self._made = 0  # iterations at an evaluation that is not noted yet

    def take(self, iterations: int) -> None:
        """Take in that an evaluation was made after so many iterations."""
        self._made = iterations

    def write(self) -> None:
        if self._made == 0:
            return
        write_or_log(self._path, str(self._made), "The next --resume may repeat one evaluation, which does no harm.")
        self._made = 0

    def read(self) -> int:
        """Return the noted number of iterations, or 0."""
        if not os.path.exists(self._path):
            return 0
        with open(self._path) as file:
            return int(file.read())

    def remove(self) -> None:
        """Remove the note of another run."""
        if os.path.exists(self._path):
            os.remove(self._path)


class CatchUp(HookBase):
    """Do on resume what an earlier run missed: an evaluation, an estimate of BatchNorm's statistics, model_final.pth.

    A checkpoint is written before the evaluation of the same iteration, and model_final.pth after the last checkpoint,
    so a kill can come between. The hook must stand after the hooks that evaluate and that keep the best.

    Args:
        period: iterations between two evaluations.
        note: notes the last evaluation.
        evaluation: Detectron2's hook.
        best: keeps the best checkpoint. None if this process keeps none.
        precise: estimates BatchNorm's statistics. None if that is off.
        request: interrupts the missed evaluation if the run is asked to stop.
        random_state: collects the state of each process for a checkpoint.
        patience: counts evaluations without a rise of the AP.
    """

    def __init__(
        self,
        period: int,
        note: EvaluationNote,
        evaluation: EvalHook,
        best: Optional[KeepBest],
        precise: Optional[PreciseStatistics],
        request: StopRequest,
        random_state: RandomState,
        patience: Patience,
    ) -> None:
        self._period = period
        self._note = note
        self._evaluation = evaluation
        self._best = best
        self._precise = precise
        self._request = request
        self._random_state = random_state
        self._patience = patience

    def _is_due(self, iterations: int) -> bool:
        return self._period > 0 and iterations % self._period == 0 and 0 < iterations < self.trainer.max_iter

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if done == 0:
            if comm.is_main_process():
                self._note.remove()
            return
        has_estimated = self._estimate(done)
        is_final = os.path.basename(self.trainer.checkpointer.resumed_from) == FINAL
        if done >= self.trainer.max_iter and (has_estimated or not is_final):
            self._save_final(done)
        # The main process's note counts, because all have to evaluate together.
        if self._is_due(done) and (self._is_uncounted(done) or comm.all_gather(self._note.read())[0] < done):
            self._evaluate(done)

    def _is_uncounted(self, done: int) -> bool:
        """Return whether the checkpoint's count of evaluations lacks the evaluation after so many iterations.

        Such an evaluation is made again if it was made, because its AP is needed.
        """
        return not self._patience.has_counted(done)

    def _estimate(self, done: int) -> bool:
        """Make a missed estimate. Return whether it was missed."""
        if self._precise is None or not self._precise.is_missing(done):
            return False
        self._precise.estimate(done)
        self._exit_if_left()
        return True

    @contextmanager
    def _in_last_iteration(self, done: int) -> Iterator[None]:
        """Let the trainer be in the last iteration that was done, as it was when the work was missed."""
        iteration, self.trainer.iter = self.trainer.iter, done - 1
        try:
            yield
        finally:
            self.trainer.iter = iteration

    def _save_final(self, done: int) -> None:
        """Write model_final.pth, as the last iteration would have done."""
        with self._in_last_iteration(done):
            self._random_state.keep()
            self.trainer.checkpointer.save("model_final", iteration=done - 1)

    def _evaluate(self, done: int) -> None:
        storage = self.trainer.storage
        storage.iter = done - 1
        with self._in_last_iteration(done):
            self._evaluation.after_step()
        self._exit_if_left()
        if self._best is not None:
            with self._in_last_iteration(done):
                self._best.after_step()
        self._note.take(done)
        with self._in_last_iteration(done):
            self._patience.after_step()
        storage.iter = done

    def _exit_if_left(self) -> None:
        """End the process if the run is asked to stop. The checkpoint that the run was resumed from is still valid."""
        if self._request.has_left:
            logger.warning("SIGTERM: the run stops before iteration %d. Continue it with --resume.", self.trainer.iter)
            raise SystemExit(EXIT_STOPPED)

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            self._note.take(self.trainer.iter + 1)
