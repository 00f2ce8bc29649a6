"""Interrupt and resume Detectron2's PreciseBN."""

from typing import Any, Dict, Iterable, Iterator

from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN
from torch import nn

from .._compat.training import NormSettings, loader_of, update_statistics
from ..data import ResumableLoader
from ..random_state import get_random_state, set_random_state
from .forward_state import ForwardState
from .stopping import LeftEarly, StopRequest


class PreciseStatistics(HookBase):
    """Run Detectron2's PreciseBN on batches that depend only on the seed and the iteration.

    Detectron2's hook keeps a stream of batches over the whole run, so a resumed run would get other statistics.

    Args:
        hook: Detectron2's hook.
        period: iterations between two estimates. The last iteration has one in any case.
        request: interrupts and undoes an estimate if the run is asked to stop. `CatchUp` makes it on resume.
    """

    def __init__(self, hook: PreciseBN, period: int, request: StopRequest) -> None:
        self._hook = hook
        self._period = period
        self._request = request
        self._done = 0

    def is_due(self, iterations: int) -> bool:
        """Return whether the statistics are estimated after so many iterations."""
        is_last = iterations >= self.trainer.max_iter
        return iterations > 0 and (is_last or (self._period > 0 and iterations % self._period == 0))

    def is_missing(self, iterations: int) -> bool:
        """Return whether the estimate that is due after so many iterations was not made."""
        return self.is_due(iterations) and self._done != iterations

    def after_step(self) -> None:
        if self.is_due(self.trainer.iter + 1):
            self.estimate(self.trainer.iter + 1)

    def estimate(self, iterations: int) -> None:
        """Estimate the statistics after so many iterations, or leave the estimate if the run is asked to stop."""
        model: nn.Module = self.trainer.model
        state, random_before, settings = ForwardState(model), get_random_state(), NormSettings(model)
        state.save()
        try:
            update_statistics(self._hook, self._batches(iterations))
            self._done = iterations
        except LeftEarly:
            settings.restore()
            state.restore()
            set_random_state(random_before)
            self._request.has_left = True

    def _batches(self, iterations: int) -> Iterator[Any]:
        # All processes decide together before each batch, because SyncBN needs all of them.
        for batch in self._loader_at(iterations):
            if self._request.agree():
                raise LeftEarly
            yield batch

    def _loader_at(self, iterations: int) -> Iterable[Any]:
        loader = loader_of(self._hook)
        if isinstance(loader, ResumableLoader):
            loader.seed, loader.start_iter = self.trainer.data_loader.seed, iterations
        return loader

    def state_dict(self) -> Dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._done = state["done"]
