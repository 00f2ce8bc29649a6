"""Turn a forward pass with non-finite values into a step that all processes can skip."""

from typing import Any, Dict, Iterator, List

import torch
from detectron2.structures import Boxes
from detectron2.utils import comm
from torch import nn

from ..errors import GDetKDError
from ..losses.build import sum_of_zeros

# A forward pass that failed returns a loss of this name.
BROKEN = "loss_forward"


class NonFiniteError(GDetKDError):
    """Report a loss that is infinite or not a number."""


class ForwardGuard(nn.Module):
    """Wrap the model that is trained, a detector or a `GDetKD` model, so that its forward pass may fail.

    Detectron2 and fvcore end a forward pass by an exception when boxes or scores are not finite. Another process does
    not see that and would wait in the backward pass. So this module returns losses that are not a number instead, with
    a gradient for every parameter, and the process takes part in every exchange of the step. `StepGuard` then finds
    these losses and decides for all processes.

    Args:
        model: the model that is trained.
        student: the plain detector in the model, or `model` itself.

    Attributes:
        failure: why the last forward pass failed; empty if it did not.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.failure = ""
        self._features: List[torch.Tensor] = []
        self._can_take_part = comm.get_world_size() == 1 or not _exchanges_beside_backbone(model, student)
        if isinstance(getattr(student, "backbone", None), nn.Module):
            student.backbone.register_forward_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._features = list(_tensors(output))

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """Return the model's output, or losses that are not a number if the forward pass fails in training.

        Raises:
            NonFiniteError: the forward pass fails, and this process cannot take part in the exchanges that the other
                processes wait for.
        """
        self.failure = ""
        if not (self.training and torch.is_grad_enabled()):
            return self.model(batched_inputs)
        try:
            return self.model(batched_inputs)
        except (FloatingPointError, AssertionError) as error:
            if not is_about_nonfinite(error):
                raise
            self.failure = str(error) or type(error).__name__
            if not self._can_take_part:
                raise NonFiniteError(
                    f"The forward pass is not finite ({self.failure}). GDetKD cannot skip this step, because the other "
                    "processes wait in a SyncBN layer outside the backbone. Use another norm there, or lower "
                    "SOLVER.BASE_LR."
                ) from error
            return self._broken_losses()
        finally:
            self._features = []

    def _broken_losses(self) -> Dict[str, torch.Tensor]:
        if hasattr(self.model, "join_exchanges"):
            self.model.join_exchanges()
        # The loss includes the features: the backward pass of SyncBN in the backbone waits for every process.
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        loss = sum_of_zeros([*parameters, *self._features]) + float("nan")
        return {name: loss for name in [BROKEN, *getattr(self.model, "terms", ())]}


def is_about_nonfinite(error: Exception) -> bool:
    """Return whether an exception is about values that are infinite or not a number.

    Detectron2 raises `FloatingPointError` in some places. fvcore and `Boxes.clip` assert instead: then the function
    that raised holds such a value.
    """
    if isinstance(error, FloatingPointError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    values = [] if frame is None else list(frame.tb_frame.f_locals.values())
    return any(not torch.isfinite(tensor).all() for tensor in _tensors(values) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers and boxes, at any depth."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Boxes):
        yield value.tensor
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _exchanges_beside_backbone(model: nn.Module, student: nn.Module) -> bool:
    """Return whether a layer outside of the student's backbone exchanges statistics in its forward pass."""
    inside = set(student.backbone.modules()) if isinstance(getattr(student, "backbone", None), nn.Module) else set()
    return any("Sync" in type(module).__name__ for module in model.modules() if module not in inside)
