"""Measure how strongly each loss term acts on the student, by the gradient of the term."""

import math
from typing import Dict, List, Optional, Sequence

import torch
from torch import nn

# Name of the student's own losses, taken together.
OWN = "student"


def term_gradients(
    losses: Dict[str, torch.Tensor], terms: Sequence[str], parameters: Sequence[nn.Parameter], scale: float = 1.0
) -> Dict[str, Dict[str, float]]:
    """Measure the gradients of weighted loss terms.

    `.grad` stays as it is, and the graph is kept for the backward pass of the training step.

    Args:
        losses: weighted scalars by name.
        terms: names of the distillation terms. All other losses are the student's own.
        parameters: the parameters in which the gradients are taken.
        scale: factor on the losses in the backward pass, undone in the result. Half precision needs a large factor.

    Returns:
        for `OWN` and each term: "norm", and "cosine" with the gradient of the student's own losses (0 if a norm is 0).
        The result is empty if a gradient is not finite. In half precision this happens until the scale has come down.
    """
    groups = {OWN: [loss for name, loss in losses.items() if name not in terms]}
    groups.update({term: [losses[term]] for term in terms})
    own = _gradient(sum(groups[OWN]), parameters, scale)
    own_norm = _product(own, own, scale) ** 0.5
    measured = {}
    for name, group in groups.items():
        # Hold one term's gradient at a time: it takes as much memory as the student's weights.
        gradient = own if name == OWN else _gradient(sum(group), parameters, scale)
        norm = _product(gradient, gradient, scale) ** 0.5
        product = norm * own_norm
        measured[name] = {"norm": norm, "cosine": _product(gradient, own, scale) / product if product > 0 else 0.0}
    return measured if all(math.isfinite(values["norm"]) for values in measured.values()) else {}


def _gradient(loss: torch.Tensor, parameters: Sequence[nn.Parameter], scale: float) -> List[Optional[torch.Tensor]]:
    """Return the gradient in each parameter, times the scale, or None where the loss does not reach it."""
    # The trainer's autocast is still on here. It would round this backward pass, unlike a step's own.
    with torch.autocast(loss.device.type, enabled=False):
        return list(torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True))


def _product(a: Sequence[Optional[torch.Tensor]], b: Sequence[Optional[torch.Tensor]], scale: float) -> float:
    """Return the inner product of two gradients, with the scale undone."""
    parts = [(x.double() * y.double()).sum() for x, y in zip(a, b) if x is not None and y is not None]
    return float(torch.stack(parts).sum()) / scale**2 if parts else 0.0
