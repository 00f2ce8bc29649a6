"""How hard each loss term pulls at the student."""

import math
from typing import Dict, List, Optional, Sequence

import torch
from torch import nn

# The student's own losses, together.
OWN = "student"


def term_gradients(
    losses: Dict[str, torch.Tensor], terms: Sequence[str], parameters: Sequence[nn.Parameter], scale: float = 1.0
) -> Dict[str, Dict[str, float]]:
    """Gradients of weighted loss terms, without touching `.grad`; the graph is kept for the step's own backward pass.

    Args:
        losses: scalars by name, weighted.
        terms: names of the distillation terms; all others are the student's own.
        parameters: what the gradients are of.
        scale: factor on the losses in the backward pass, undone in the result: half precision needs a large one.

    Returns:
        for `OWN` and each term: "norm", and "cosine" with the student's own gradient, 0 where one of them is 0. Nothing
        where a gradient is not finite, as the first of a training in half precision are until its scale has come down.
    """
    groups = {OWN: [loss for name, loss in losses.items() if name not in terms]}
    groups.update({term: [losses[term]] for term in terms})
    own = _gradient(sum(groups[OWN]), parameters, scale)
    own_norm = _product(own, own, scale) ** 0.5
    found = {}
    for name, group in groups.items():
        # One term's at a time: of a large student each takes as much memory as its weights.
        gradient = own if name == OWN else _gradient(sum(group), parameters, scale)
        norm = _product(gradient, gradient, scale) ** 0.5
        product = norm * own_norm
        found[name] = {"norm": norm, "cosine": _product(gradient, own, scale) / product if product > 0 else 0.0}
    return found if all(map(math.isfinite, (each["norm"] for each in found.values()))) else {}


def _gradient(loss: torch.Tensor, parameters: Sequence[nn.Parameter], scale: float) -> List[Optional[torch.Tensor]]:
    """Return the gradient in each parameter, times the scale, or None where the loss does not reach it."""
    # The trainer's autocast is still on here. It would round this backward pass, unlike a step's own.
    with torch.autocast(loss.device.type, enabled=False):
        return list(torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True))


def _product(a: Sequence[Optional[torch.Tensor]], b: Sequence[Optional[torch.Tensor]], scale: float) -> float:
    """The inner product of two gradients, the scale undone."""
    parts = [(x.double() * y.double()).sum() for x, y in zip(a, b) if x is not None and y is not None]
    return float(torch.stack(parts).sum()) / scale**2 if parts else 0.0
