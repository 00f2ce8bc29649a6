"""How hard each loss term pulls at the student."""

from typing import Dict, List, Sequence

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
        for `OWN` and each term: "norm", and "cosine" with the student's own gradient, 0 where one of them is 0.
    """
    groups = {OWN: [loss for name, loss in losses.items() if name not in terms]}
    groups.update({term: [losses[term]] for term in terms})
    gradients = {name: _gradient(sum(group), parameters, scale) for name, group in groups.items()}
    own = gradients[OWN]
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    return {
        name: {
            "norm": norms[name],
            "cosine": float(gradient @ own) / (norms[name] * norms[OWN]) if norms[name] * norms[OWN] > 0 else 0.0,
        }
        for name, gradient in gradients.items()
    }


def _gradient(loss: torch.Tensor, parameters: Sequence[nn.Parameter], scale: float) -> torch.Tensor:
    """(P,) of all parameters, flat."""
    found = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
    parts: List[torch.Tensor] = [
        torch.zeros_like(parameter).flatten() if each is None else each.flatten()
        for each, parameter in zip(found, parameters)
    ]
    return torch.cat(parts).double() / scale
