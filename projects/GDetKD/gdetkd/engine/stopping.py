"""Stop all processes on SIGTERM, save the run, and let --resume continue it."""

import itertools
import logging
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import Any, ClassVar, Dict, Iterator, List, Optional, Tuple

from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..errors import GDetKDError
from .exchange import Notice, on_any_process
from .hooks import RandomState

logger = logging.getLogger(__name__)

# Exit code of a run that saved and ended because of SIGTERM: "try again" in sysexits.h, here with --resume.
EXIT_STOPPED = 75
# Seconds between two looks for a request that reached another process alone.
LOOK_EVERY = 1.0


class LeftEarly(Exception):
    """Interrupt work that a resumed run repeats, because the run is asked to stop."""


class StopRequest:
    """Know whether the run is asked to stop, by SIGTERM to this process or to another process.

    Attributes:
        is_asked: this process got SIGTERM.
        is_agreed: every process knows of the request, so all of them stop at the same place.
        has_left: an evaluation or an estimate was interrupted. A resumed run repeats it.
    """

    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self.is_asked = False
        self.is_agreed = False
        self.has_left = False
        # Every process makes its trainers in the same order, so the number names the same run everywhere.
        self._notice = Notice(f"stop{next(self._count)}")
        self._next_look = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM inside instead of ending at once. Python lets only the main thread handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: Any) -> None:
        self.is_asked = True

    def agree(self) -> bool:
        """Return whether any process is asked to stop. All processes must call this together."""
        if not self.is_agreed:
            self.is_agreed = on_any_process(self.is_asked)
        return self.is_agreed

    def leave_if_asked(self) -> None:
        """Raise `LeftEarly` if this process or another process is asked to stop.

        The processes need not call this equally often. `agree` must follow on every process, interrupted or not.
        """
        if self.is_asked:
            self._notice.leave()
        if self.is_asked or self.is_agreed or self._is_noticed():
            raise LeftEarly

    def _is_noticed(self) -> bool:
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_EVERY
        return self._notice.is_there()


class Interruptible(DatasetEvaluator):
    """Leave an evaluation between two images when the run is asked to stop.

    All processes leave it before the evaluator exchanges anything.

    Raises:
        LeftEarly: `process` raises it, or `evaluate` on every process.
    """

    def __init__(self, evaluator: DatasetEvaluator, request: StopRequest) -> None:
        self._evaluator = evaluator
        self._request = request

    def reset(self) -> None:
        self._evaluator.reset()

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, Any]]) -> None:
        self._request.leave_if_asked()
        self._evaluator.process(inputs, outputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        if self._request.agree():
            raise LeftEarly
        return self._evaluator.evaluate()


class AgreedStop(HookBase):
    """Save and end a run that all processes agreed to stop.

    The hook stands at two places: after the work that belongs to a step, and after the evaluation, which may have been
    interrupted. `CatchUp` repeats on resume what was interrupted.

    Args:
        request: tells whether to stop.
        random_state: keeps the random states for the checkpoint.
    """

    def __init__(self, request: StopRequest, random_state: RandomState) -> None:
        self._request = request
        self._random_state = random_state

    def _must_stop(self) -> bool:
        # The last iteration still writes model_final.pth. After that only an evaluation is left.
        is_last = self.trainer.iter + 1 >= self.trainer.max_iter
        return self._request.has_left or (self._request.is_agreed and not is_last)

    def after_step(self) -> None:
        """Save the run and end the process, if all processes agreed to stop.

        Raises:
            SystemExit: with EXIT_STOPPED. The run is saved, and --resume continues it.
            GDetKDError: the run could not be saved, and ends.
        """
        if not self._must_stop():
            return
        iteration = self.trainer.iter
        self._random_state.keep()
        # The exchange also makes all processes wait for the save: a launcher ends all processes as soon as one ends.
        is_saved, last = comm.all_gather(self._save(iteration) if comm.is_main_process() else None)[0]
        if not is_saved:
            raise GDetKDError(
                f"SIGTERM: the run stops after iteration {iteration} and could NOT be saved. Make room in "
                f"{self.trainer.cfg.OUTPUT_DIR}. --resume continues from {last or 'the beginning'} and repeats the "
                "later iterations."
            )
        logger.warning(
            "SIGTERM: the run stops after iteration %d, with exit code %d. Continue it with --resume.",
            iteration,
            EXIT_STOPPED,
        )
        raise SystemExit(EXIT_STOPPED)

    def _save(self, iteration: int) -> Tuple[bool, str]:
        """Save the run. Return whether that worked, and the name of the file that --resume continues from."""
        checkpointer, name = self.trainer.checkpointer, f"model_{iteration:07d}"
        before = len(checkpointer.failed)
        checkpointer.save(name, iteration=iteration)
        return len(checkpointer.failed) == before, os.path.basename(checkpointer.get_checkpoint_file())


class LeaveAtTheEnd(HookBase):
    """End a run with EXIT_STOPPED if its final evaluation was interrupted.

    The hook must come last, so that all other hooks end properly. model_final.pth is written by then, and --resume
    evaluates it.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def after_train(self) -> None:
        # A run that failed before its end already shows an error.
        if self._request.has_left and self.trainer.iter >= self.trainer.max_iter:
            logger.warning(
                "SIGTERM: the final evaluation was interrupted. Run again with --resume to evaluate model_final.pth."
            )
            raise SystemExit(EXIT_STOPPED)
