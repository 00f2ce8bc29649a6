"""What the trainer does beside the steps: random states for resume, time, and the best checkpoint."""

import logging
import os
import random
import time
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm


def get_random_state() -> Dict[str, Any]:
    """Of Python, NumPy, torch and CUDA, in types that a safe loader of checkpoints accepts."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Undoes `get_random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class RandomState(HookBase):
    """Keeps every process's random state for the checkpoint that the main process is about to write.

    It must stand before the hook that writes. On resume the state is set when training begins.
    """

    def __init__(self, period: int) -> None:
        self._period = period
        self._states: Optional[List[Dict[str, Any]]] = None
        self._loaded: Optional[List[Dict[str, Any]]] = None

    def before_train(self) -> None:
        if self._loaded is not None:
            set_random_state(self._loaded[comm.get_rank()])
            self._loaded = None

    def after_step(self) -> None:
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if last or (self._period > 0 and (self.trainer.iter + 1) % self._period == 0):
            self._states = comm.gather(get_random_state())

    def state_dict(self) -> Dict[str, Any]:
        return {"states": self._states} if self._states else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        processes = len(state["states"])
        if processes == comm.get_world_size():
            self._loaded = state["states"]
        else:
            logging.getLogger(__name__).warning(
                "The run was started with %d processes and goes on with %d: its draws and batches will be others.",
                processes,
                comm.get_world_size(),
            )


class Stopwatch(HookBase):
    """Logs `train_seconds`: time in training steps so far, without evaluations and checkpoints, kept across resumes.

    It must stand first, before the hooks that take time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._start = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        self.trainer.storage.put_scalar("train_seconds", self._seconds, smoothing_hint=False)

    def state_dict(self) -> Dict[str, Any]:
        return {"seconds": self._seconds}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._seconds = state["seconds"]


class _WeightsOnly(DetectionCheckpointer):
    """Writes a model without naming it the checkpoint to resume from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class KeepBest(BestCheckpointer):
    """Detectron2's best checkpoint, but resumed with its record, and never resumed from.

    The record is kept in model_best.pth itself: the checkpoint to resume from is written before the evaluation of the
    same iteration, and would forget it.
    """

    def __init__(self, period: int, student: torch.nn.Module, output_dir: str, metric: str = "bbox/AP") -> None:
        self._metric = metric
        self._path = os.path.join(output_dir, "model_best.pth")
        self._record = _Record()
        super().__init__(period, _WeightsOnly(student, output_dir, record=self._record), metric)

    def _best_checking(self) -> None:
        self._record.metric = self.trainer.storage.latest().get(self._metric, (None,))[0]
        super()._best_checking()

    def state_dict(self) -> Dict[str, Any]:
        return {"path": os.path.basename(self._path)}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if os.path.exists(self._path):
            best = torch.load(self._path, map_location="cpu", weights_only=True)
            self.best_metric, self.best_iter = best["record"]["metric"], best["iteration"]


class _Record:
    """The score of the weights that it is written beside."""

    metric: Optional[float] = None

    def state_dict(self) -> Dict[str, Any]:
        return {"metric": self.metric}
