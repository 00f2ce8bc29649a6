"""End a training whose AP no longer rises (TEST.PATIENCE)."""

import json
import logging
import math
import os
from typing import Any, Dict, Optional

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..files import write_or_log
from ..metrics_file import EARLY_END, score_prefix
from .hooks import RandomState

logger = logging.getLogger(__name__)


class Patience(HookBase):
    """End a training when its best AP has not risen for TEST.PATIENCE evaluations in a row.

    The training ends as at the regular end: the hook lowers `trainer.max_iter` and writes model_final.pth.

    - An evaluation without an AP, or with an AP that is not a number, counts as an evaluation without a rise.
    - All processes count alike, with the AP of the main process.
    - The hook must stand after the hooks that evaluate, keep the best and note the evaluation.
    - With TEST.PATIENCE 0 the hook only removes the file that an earlier run left.

    Args:
        cfg: the config of the run.
        random_state: keeps the random states for model_final.pth.

    Attributes:
        is_over: the training has ended early, in this process or in the run that is resumed.
        has_just_ended: this process ended the training, so its last weights are already evaluated.
    """

    def __init__(self, cfg: CfgNode, random_state: RandomState) -> None:
        self._patience: int = cfg.TEST.PATIENCE
        self._period: int = cfg.TEST.EVAL_PERIOD
        self._metric = f"{score_prefix(cfg)}bbox/AP"
        self._dataset = next(iter(cfg.DATASETS.TEST), "")  # it gives the AP
        self._note = os.path.join(cfg.OUTPUT_DIR, EARLY_END)
        self._random_state = random_state
        self._best: Optional[float] = None
        self._best_iterations = 0
        self._without_rise = 0
        self._counted = 0  # iterations that were done at the last evaluation
        self.is_over = False
        self.has_just_ended = False

    def has_counted(self, iterations: int) -> bool:
        """Return whether the evaluation after so many iterations is counted, or need not be."""
        return self._patience == 0 or self._counted == iterations

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        if self.is_over:
            self._write_note(self._counted)
        elif os.path.exists(self._note):
            os.remove(self._note)  # the training goes on, or another run in this folder left the file

    def after_step(self) -> None:
        iterations = self.trainer.iter + 1
        if self._patience and iterations % self._period == 0 and iterations < self.trainer.max_iter:
            self.count()

    def count(self) -> None:
        """Count the evaluation of this iteration, and end the training if the AP has not risen for long enough.

        All processes must call this together.
        """
        iterations = self.trainer.iter + 1
        ap = comm.all_gather(self._latest() if comm.is_main_process() else None)[0]
        self._counted = iterations
        if math.isfinite(ap) and (self._best is None or ap > self._best):
            self._best, self._best_iterations, self._without_rise = ap, iterations, 0
            return
        self._without_rise += 1
        if self._without_rise >= self._patience:
            self._end(iterations)

    def _latest(self) -> float:
        """Return the AP of this iteration's evaluation in percent. It is not a number if there is no AP."""
        ap, iteration = self.trainer.storage.latest().get(self._metric, (math.nan, -1))
        return ap if iteration == self.trainer.storage.iter else math.nan

    def _end(self, iterations: int) -> None:
        logger.info(
            "TEST.PATIENCE: the training ends after %d of %d iterations, because %s has not risen for %d evaluations. "
            "%s.",
            iterations,
            self.trainer.max_iter,
            self._metric,
            self._without_rise,
            self._describe_best(),
        )
        self.trainer.max_iter = iterations
        self.is_over = self.has_just_ended = True
        self._random_state.keep()
        self.trainer.checkpointer.save("model_final", iteration=iterations - 1)
        if comm.is_main_process():
            self._write_note(iterations)

    def _describe_best(self) -> str:
        if self._best is None:
            return "No evaluation gave an AP"
        return f"The best AP is {self._best:.2f}, after {self._best_iterations} iterations"

    def _write_note(self, iterations: int) -> None:
        """Write how many iterations were run, for programs that read the run's folder."""
        consequence = "Comparisons do not see that the run is complete. Make room and run again with --resume."
        write_or_log(self._note, json.dumps({"iterations": iterations}), consequence)

    def say_that_it_is_over(self) -> None:
        """Log that a resumed run is not trained further."""
        logger.warning(
            "--resume: this training ended early after %d iterations, because %s had not risen for %d evaluations "
            "(TEST.PATIENCE). It is not trained further. %s. To train further, raise TEST.PATIENCE or set it to 0.",
            self._counted,
            self._metric,
            self._without_rise,
            self._describe_best(),
        )

    def state_dict(self) -> Dict[str, Any]:
        if not self._patience:
            return {}
        return {
            "dataset": self._dataset,
            "best": self._best,
            "best_iterations": self._best_iterations,
            "without_rise": self._without_rise,
            "counted": self._counted,
            "is_over": self.is_over,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if state["dataset"] != self._dataset:
            logger.warning(
                "The AP so far was measured on %r, and DATASETS.TEST names %r now. TEST.PATIENCE counts from 0.",
                state["dataset"],
                self._dataset,
            )
            return
        self._best, self._best_iterations = state["best"], state["best_iterations"]
        self._without_rise, self._counted = state["without_rise"], state["counted"]
        # A larger TEST.PATIENCE, or none, lets the training go on.
        self.is_over = state["is_over"] and 0 < self._patience <= self._without_rise
