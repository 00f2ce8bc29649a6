"""Let all processes agree before each optimizer step, and take the step or leave it out."""

from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from .._compat.training import AfterBackward
from ..errors import GDetKDError
from .exchange import any_and_mean
from .gradients import describe_unreached, find_unreached
from .guard import StepGuard, StepSkipped
from .schedule import LossSchedule
from .stopping import StopRequest

TakeScalars = Callable[[], Dict[str, torch.Tensor]]


class StepAgreement(HookBase):
    """Exchange two flags before each optimizer step: a loss is not finite, and the run is asked to stop.

    The flags and the values to log share one exchange, because every exchange makes the processes wait for each other.
    The losses and these values are read from the device together. The hook belongs to the trainer that runs the single
    steps.

    Args:
        guard: finds losses that are not finite, and ends the step or the run.
        request: learns whether any process is asked to stop.
        schedule: gives the values of the distillation terms, whose mean over the processes is logged, and measures what
            sets its weights.
        take_local: returns further values to log, as scalar tensors by name. They may differ in number between
            processes, because only those of the main process are logged. None: there are none.
    """

    def __init__(
        self, guard: StepGuard, request: StopRequest, schedule: LossSchedule, take_local: Optional[TakeScalars]
    ) -> None:
        self._guard = guard
        self._request = request
        self._schedule = schedule
        self._take_local = take_local
        self._losses: Dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Keep the losses that `model` returns in training.

        Call this after the schedule is attached: it changes what the model returns.
        """
        model.register_forward_hook(self._keep_losses)

    def _keep_losses(
        self, model: nn.Module, inputs: Tuple[Any, ...], output: Union[torch.Tensor, Dict[str, torch.Tensor]]
    ) -> None:
        if model.training and torch.is_grad_enabled():
            losses = {"total_loss": output} if isinstance(output, torch.Tensor) else output
            self._losses = {name: loss.detach() for name, loss in losses.items()}

    def after_backward(self) -> None:
        """Make the exchange of the step. Leave out the step, or stop the run, if a loss is not finite.

        Raises:
            StepSkipped: a loss of some process is not finite, and that is tolerated.
            NonFiniteError: a loss of some process is not finite, and that is not tolerated.
        """
        local = self._take_local() if self._take_local is not None else {}
        losses, scalars, own = _read(self._losses, self._schedule.take_scalars(), local)
        self._losses = {}
        terms = self._guard.find(losses)
        gradients = self._schedule.take_gradients()
        shared = {**scalars, **gradients}
        flags, values = any_and_mean([bool(terms), self._request.is_asked], list(shared.values()))
        some_not_finite, self._request.is_agreed = flags
        means = dict(zip(shared, values))
        if some_not_finite:
            self._guard.skip_or_stop(terms)
        self._schedule.follow({name: means[name] for name in gradients})
        if comm.is_main_process():
            get_event_storage().put_scalars(smoothing_hint=False, **{name: means[name] for name in scalars}, **own)


class UnreachedParameters(HookBase):
    """End a run in several processes after its first backward pass if no loss reaches a parameter of the student.

    Otherwise DistributedDataParallel would end it in the second step, with an error that names no parameter.

    Args:
        student: the student.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._is_first = True

    def after_backward(self) -> None:
        """
        Raises:
            GDetKDError: a trainable parameter has no gradient.
        """
        names = find_unreached(self._student) if self._is_first and comm.get_world_size() > 1 else []
        self._is_first = False
        if names:
            raise GDetKDError(describe_unreached(names))


def _read(*groups: Dict[str, torch.Tensor]) -> List[Dict[str, float]]:
    """Return groups of scalar tensors as numbers. This waits for the device, once."""
    tensors = [tensor.float().sum() for group in groups for tensor in group.values()]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(numbers) for name in group} for group in groups]


class _MaySkip(AfterBackward):
    """End a step without an error if `StepAgreement` leaves it out."""

    def run_step(self) -> None:
        try:
            super().run_step()
        except StepSkipped:
            self.optimizer.zero_grad()


class GuardedTrainer(_MaySkip, SimpleTrainer):
    """Detectron2's `SimpleTrainer`, which can leave out steps."""


class GuardedAMPTrainer(_MaySkip, AMPTrainer):
    """Detectron2's `AMPTrainer`, which can leave out steps."""
