"""Detectron2's PreciseBN, which can be interrupted and resumed."""

from typing import Any, Dict, Iterable, Iterator

from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN
from torch import nn

from ..data import ResumableLoader
from ..random_state import get_random_state, set_random_state
from .forward_state import ForwardState
from .stopping import LeftEarly, StopRequest


class PreciseStatistics(HookBase):
    """Runs Detectron2's PreciseBN on batches that depend on the seed and the iteration alone.

    Detectron2's hook goes on in a stream of batches of its own, so a resumed run would get other statistics.

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
        """Estimate the statistics after so many iterations, or leave it if the run is asked to stop."""
        model: nn.Module = self.trainer.model
        state, random_before = ForwardState(model), get_random_state()
        layers = _LayersAsTheyAre(model)
        state.save()
        self._hook._data_iter = self._batches(iterations)
        try:
            self._hook.update_stats()
            self._done = iterations
        except LeftEarly:
            layers.restore()
            state.restore()
            set_random_state(random_before)
            self._request.has_left = True
        finally:
            self._hook._data_iter = None

    def _batches(self, iterations: int) -> Iterator[Any]:
        # All decide together before each batch, because SyncBN needs all of them.
        for batch in self._loader_at(iterations):
            if self._request.agree():
                raise LeftEarly
            yield batch

    def _loader_at(self, iterations: int) -> Iterable[Any]:
        loader = self._hook._data_loader
        if isinstance(loader, ResumableLoader):
            loader.seed, loader.start_iter = self.trainer.data_loader.seed, iterations
        return loader

    def state_dict(self) -> Dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._done = state["done"]


class _LayersAsTheyAre:
    """Keeps settings of BatchNorm's layers that fvcore's estimate restores only when it completes."""

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._before = [(norm, norm.momentum, list(norm._forward_pre_hooks)) for norm in norms]

    def restore(self) -> None:
        for norm, momentum, hooks in self._before:
            norm.momentum = momentum
            for added in set(norm._forward_pre_hooks) - set(hooks):
                del norm._forward_pre_hooks[added]
