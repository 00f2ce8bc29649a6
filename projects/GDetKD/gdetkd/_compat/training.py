"""Open Detectron2's trainers, and reach BatchNorm where torch and fvcore have no public name."""

from typing import Any, Dict, Iterator, List

import torch
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.engine.hooks import PreciseBN
from torch import nn

# Detectron2 main calls `after_backward` of hooks and trainers. v0.6 does not.
CALLS_AFTER_BACKWARD = hasattr(SimpleTrainer, "after_backward")
# Detectron2 main saves the optimizer with a `DefaultTrainer`. v0.6 does not.
SAVES_OPTIMIZER = "state_dict" in vars(DefaultTrainer)


class _LastIterationDone(BaseException):
    """Leave the loop of a training. Detectron2 logs an `Exception` as an error."""


class ShortenableLoop(TrainerBase):
    """End a training as at the regular end if a hook lowers `max_iter`.

    The loop of v0.6 and main reads `max_iter` once, at its start. In the bases of a class, this class must come after
    `DefaultTrainer`, whose `train` then calls the `train` below.
    """

    _loop_end = 0

    def train(self, start_iter: int, max_iter: int) -> None:
        self._loop_end = max_iter
        try:
            super().train(start_iter, max_iter)
        except _LastIterationDone:
            pass

    def before_train(self) -> None:
        super().before_train()
        self._leave_if_done(self.iter)

    def after_step(self) -> None:
        super().after_step()
        self._leave_if_done(self.iter + 1)

    def _leave_if_done(self, iterations: int) -> None:
        if self.max_iter <= iterations < self._loop_end:
            self.iter = iterations  # hooks see the same number in `after_train` as at the regular end
            raise _LastIterationDone


class BareTrainer(DefaultTrainer, ShortenableLoop):
    """Detectron2's `DefaultTrainer` without its `__init__`: a subclass builds the parts.

    `DefaultTrainer.__init__` of v0.6 and main saves the whole model and gives a model on the CPU a GPU under DDP. It
    takes no argument that changes this.
    """

    def __init__(self) -> None:
        super(DefaultTrainer, self).__init__()

    def run_steps_with(self, trainer: SimpleTrainer) -> None:
        """Set the trainer that runs the single steps. v0.6 and main set it in `DefaultTrainer.__init__` alone."""
        self._trainer = trainer

    @property
    def loss_scale(self) -> float:
        """Return the factor on the losses in the backward pass. It is 1 without mixed precision.

        v0.6 and main keep the scaler of the gradients in the trainer that runs the single steps.
        """
        scaler = getattr(self._trainer, "grad_scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def keep_results(self, results: Dict[str, Any]) -> None:
        """Keep the metrics that `train` returns. v0.6 and main have only the attribute."""
        self._last_eval_results = results

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        if not SAVES_OPTIMIZER:
            state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not SAVES_OPTIMIZER:
            self._trainer.load_state_dict(state_dict["_trainer"])


class AfterBackward:
    """Call `after_backward` of a `SimpleTrainer`'s hooks between the backward pass and the optimizer's step.

    Detectron2 main does so itself. v0.6 calls no method there but `_write_metrics`.
    """

    if not CALLS_AFTER_BACKWARD:

        def _write_metrics(self, loss_dict: Dict[str, torch.Tensor], data_time: float, prefix: str = "") -> None:
            for hook in self._hooks:
                if hasattr(hook, "after_backward"):
                    hook.after_backward()
            super()._write_metrics(loss_dict, data_time, prefix)


def keeps_moving_average(module: nn.Module) -> bool:
    """Return whether a detector divides its losses by a moving average, as RetinaNet and FCOS of v0.6 and main do.

    The average is an attribute `loss_normalizer`. Keypoint heads have a constant of that name, so the attribute alone
    does not tell.
    """
    return hasattr(module, "_ema_update")


def batch_norms(model: nn.Module) -> List[nn.Module]:
    """Return the BatchNorm layers of a model. No torch up to 2.15 has a public name for their base class."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def loader_of(hook: PreciseBN) -> Any:
    """Return the data loader that `DefaultTrainer.build_hooks` gave to PreciseBN. v0.6 and main keep it private."""
    return hook._data_loader


def update_statistics(hook: PreciseBN, batches: Iterator[Any]) -> None:
    """Let PreciseBN estimate BatchNorm's statistics on given batches. v0.6 and main take no other batches."""
    hook._data_iter = batches
    try:
        hook.update_stats()
    finally:
        hook._data_iter = None


class NormSettings:
    """Restore the momentum and the hooks of BatchNorm layers after an estimate that was interrupted.

    fvcore's `update_bn_stats` up to 0.1.5 restores them only if it completes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [(norm, norm.momentum, list(norm._forward_pre_hooks)) for norm in batch_norms(model)]

    def restore(self) -> None:
        for norm, momentum, hooks in self._before:
            norm.momentum = momentum
            for added in set(norm._forward_pre_hooks) - set(hooks):
                del norm._forward_pre_hooks[added]
