"""Measure how strongly each loss term acts on the student, by the gradient of the term."""

import math
from typing import Dict, List, Mapping, Optional, Sequence

import torch
from torch import nn

from ..errors import some
from ..structures import full_precision

# Name of the student's own losses, taken together.
OWN = "student"

Gradient = List[Optional[torch.Tensor]]


def term_gradients(
    losses: Mapping[str, torch.Tensor], terms: Sequence[str], inputs: Sequence[torch.Tensor], scale: float = 1.0
) -> Dict[str, Dict[str, float]]:
    """Measure the gradients of loss terms, all at one scale. See `gradients_at_scales`.

    Returns:
        an empty dict if a gradient is not finite. In half precision this happens until the trainer has lowered the
        scale.
    """
    measured = gradients_at_scales(losses, terms, inputs, dict.fromkeys([OWN, *terms], scale))
    return measured if all(math.isfinite(values["norm"]) for values in measured.values()) else {}


def gradients_at_scales(
    losses: Mapping[str, torch.Tensor],
    terms: Sequence[str],
    inputs: Sequence[torch.Tensor],
    scales: Mapping[str, float],
) -> Dict[str, Dict[str, float]]:
    """Measure the gradients of loss terms.

    `.grad` stays as it is, and the graph is kept for the backward pass of the training step.

    Args:
        losses: scalars by name.
        terms: names of the distillation terms. All other losses are the student's own.
        inputs: the parameters or feature maps in which the gradients are taken.
        scales: for `OWN` and each term, the factor on the losses in the backward pass. It is divided out of the result.
            In half precision small gradients become 0 without it.

    Returns:
        for `OWN` and each term: "norm", and "cosine" with the gradient of the student's own losses (0 if a norm is 0).
        If a gradient overflows, its norm is infinite or NaN.
    """
    groups = {OWN: [loss for name, loss in losses.items() if name not in terms]}
    groups.update({term: [losses[term]] for term in terms})
    own = _gradient(sum(groups[OWN]), inputs, scales[OWN])
    own_norm = _product(own, own) ** 0.5
    measured = {}
    for name, group in groups.items():
        # Hold one term's gradient at a time, beside that of the own losses: each takes as much memory as the inputs.
        gradient = own if name == OWN else _gradient(sum(group), inputs, scales[name])
        norm = _product(gradient, gradient) ** 0.5
        lengths = norm * own_norm
        measured[name] = {"norm": norm, "cosine": _product(gradient, own) / lengths if lengths > 0 else 0.0}
    return measured


def find_unreached(model: nn.Module) -> List[str]:
    """Return the names of the trainable parameters that have no gradient after a backward pass."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def describe_unreached(names: Sequence[str]) -> str:
    """Say why a training in several processes is not possible, and what to do."""
    return (
        f"No loss reaches {len(names)} parameters of the student ({some(names)}), and with several processes "
        "DistributedDataParallel would wait for their gradients. They often belong to a level of the pyramid that the "
        "heads do not read. Leave that level out of MODEL.FPN.IN_FEATURES, or train in one process."
    )


def _gradient(loss: torch.Tensor, inputs: Sequence[torch.Tensor], scale: float) -> Gradient:
    """Return the gradient in each input in full precision, or None where the loss does not reach it."""
    if not loss.requires_grad:  # a loss may be a plain zero if a batch has nothing for it
        return [None] * len(inputs)
    # The trainer's autocast is still on here. A step runs its backward pass without it.
    with torch.autocast(loss.device.type, enabled=False):
        scaled = torch.autograd.grad(loss * scale, inputs, retain_graph=True, allow_unused=True)
    found = [None if gradient is None else full_precision(gradient) for gradient in scaled]
    return found if scale == 1 else [None if gradient is None else gradient / scale for gradient in found]


def _product(a: Gradient, b: Gradient) -> float:
    """Return the inner product of two gradients."""
    both = [(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b) if x is not None and y is not None]
    return float(torch.stack([torch.dot(x, y).double() for x, y in both]).sum()) if both else 0.0
