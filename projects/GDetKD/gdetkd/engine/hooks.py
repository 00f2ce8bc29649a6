"""Keep random states for resume, the training time and the best checkpoint, and survive a full disk."""

import logging
import math
import os
import time
from typing import Any, Callable, Dict, List, Optional

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..distiller import GDetKD
from ..random_state import get_random_state, set_random_state
from ..safe_load import DamagedFileError, read_weights
from .checkpoint import DurableCheckpointer
from .forward_state import normalizers, set_normalizers
from .resume import RunRecord
from .step_costs import is_on_gpu

logger = logging.getLogger(__name__)


class RandomState(HookBase):
    """Collect the state of every process for the checkpoint that the main process is about to write.

    This is the random state, and the moving average that a dense detector divides its losses by. The hook must come
    before the hook that writes. On resume the states are set when training begins.

    Args:
        period: iterations between two checkpoints.
    """

    def __init__(self, period: int) -> None:
        self._period = period
        self._states: Optional[List[Dict[str, Any]]] = None
        self._loaded: Optional[Dict[str, Any]] = None

    def before_train(self) -> None:
        if self._loaded is None:
            return
        if "python" in self._loaded:
            set_random_state(self._loaded)
        set_normalizers(self.trainer.student, self._loaded["normalizers"])
        self._loaded = None

    def after_step(self) -> None:
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if last or (self._period > 0 and (self.trainer.iter + 1) % self._period == 0):
            self.keep()

    def keep(self, random_state: Optional[Dict[str, Any]] = None) -> None:
        """Keep the present state of every process, or the given random state. All must call it together."""
        state = get_random_state() if random_state is None else random_state
        self._states = comm.gather({**state, "normalizers": normalizers(self.trainer.student)})

    def state_dict(self) -> Dict[str, Any]:
        return {"states": self._states} if self._states else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        processes = len(state["states"])
        if processes == comm.get_world_size():
            self._loaded = state["states"][comm.get_rank()]
            return
        self._loaded = {"normalizers": state["states"][0]["normalizers"]}
        logger.warning(
            "The run was started with %d processes and goes on with %d, so its batches and random numbers change. "
            "Use %d to continue exactly.",
            processes,
            comm.get_world_size(),
            processes,
        )


class DistilUntil(HookBase):
    """Let a distiller distil in the first iterations. After them the student trains alone.

    Args:
        share: share of SOLVER.MAX_ITER in which the student is distilled.
    """

    def __init__(self, distiller: GDetKD, share: float) -> None:
        self._distiller = distiller
        self._share = share

    def before_step(self) -> None:
        end = math.ceil(self._share * self.trainer.cfg.SOLVER.MAX_ITER)
        distils = self.trainer.iter < end
        if self._distiller.distils and not distils:
            logger.info("From iteration %d on, the student trains without distillation.", end)
        self._distiller.distils = distils


class Stopwatch(HookBase):
    """Log `train_seconds`: the time in training steps so far, without evaluations and checkpoints, kept on resume.

    On a GPU, also log `max_mem`: the most memory (MB) that this process has had since its start. The hook must come
    first, before the hooks that take time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._start = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        self.trainer.storage.put_scalar("train_seconds", self._seconds, smoothing_hint=False)
        if is_on_gpu():
            memory = torch.cuda.max_memory_allocated() / 2**20
            self.trainer.storage.put_scalar("max_mem", memory, smoothing_hint=False)

    def state_dict(self) -> Dict[str, Any]:
        return {"seconds": self._seconds}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._seconds = state["seconds"]


class EvaluationHook(EvalHook):
    """Evaluate as Detectron2's hook, but not after an error in the last iteration.

    Detectron2's hook would, and would wait for the other processes, which are still in that iteration.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class _WeightsOnly(DurableCheckpointer):
    """Write a model that is not the checkpoint to resume from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class KeepBest(BestCheckpointer):
    """Keep the best checkpoint as Detectron2 does. A resumed run knows the best score, but never starts from its file.

    model_best.pth holds the score, because the checkpoint to resume from is written before the evaluation of the same
    iteration.

    Args:
        dataset: the dataset that gives the metric. A score on another dataset does not count.
        run: describes the run in the file.
    """

    def __init__(
        self,
        period: int,
        student: torch.nn.Module,
        output_dir: str,
        dataset: str,
        run: RunRecord,
        metric: str = "bbox/AP",
    ) -> None:
        self._metric = metric
        self._path = os.path.join(output_dir, "model_best.pth")
        self._record = _Record(dataset)
        self._weights = _WeightsOnly(student, output_dir, record=self._record, run=run)
        super().__init__(period, self._weights, metric)

    def after_step(self) -> None:
        self._check_with(super().after_step)

    def after_train(self) -> None:
        self._check_with(super().after_train)

    def _check_with(self, check: Callable[[], None]) -> None:
        self._record.metric, iteration = self.trainer.storage.latest().get(self._metric, (None, None))
        if self._record.metric is not None and iteration != self.trainer.storage.iter:
            return  # the score is of an earlier evaluation
        before, failed = (self.best_metric, self.best_iter), len(self._weights.failed)
        check()
        if len(self._weights.failed) > failed:
            self.best_metric, self.best_iter = before  # the file of the earlier score is still there

    def state_dict(self) -> Dict[str, Any]:
        return {"path": os.path.basename(self._path)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if not os.path.exists(self._path):
            return
        try:
            best = read_weights(self._path)
        except DamagedFileError as e:
            logger.warning("%s The best score so far is lost, so the next evaluation writes a new model_best.pth.", e)
            return
        dataset = best["record"]["dataset"]
        if dataset != self._record.dataset:
            logger.warning(
                "The best score so far, %.2f, was measured on %r, and DATASETS.TEST names %r now. So the next "
                "evaluation writes a new model_best.pth.",
                best["record"]["metric"],
                dataset,
                self._record.dataset,
            )
            return
        self.best_metric, self.best_iter = best["record"]["metric"], best["iteration"]


class _Record:
    """Hold the score of the weights in the same file, and the dataset on which it was measured."""

    def __init__(self, dataset: str) -> None:
        self.metric: Optional[float] = None
        self.dataset = dataset

    def state_dict(self) -> Dict[str, Any]:
        return {"metric": self.metric, "dataset": self.dataset}


class TolerantWriter(EventWriter):
    """Write metrics with another writer, and log an error of the disk. Detectron2 would end the training."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as e:
            logger.error("Could not write metrics (%s: %s).", type(self._writer).__name__, e.strerror or e)
