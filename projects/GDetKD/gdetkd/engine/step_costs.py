"""What a few real steps cost, and what each term sends to the student. Nothing is updated."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import nn

# An iteration after every warm-up.
LATE = 10**9
# Factors on a loss in half precision, where a small gradient is 0 without one, and a large one infinite with it.
SCALES = (2.0**16, 2.0**8, 1.0)


@dataclass(frozen=True)
class TermCost:
    """
    Attributes:
        weighted: value of the loss as it is added to the total, mean over the batches.
        gradient: norm of its gradient in the student's parameters, mean over the batches.
    """

    weighted: float
    gradient: float


@dataclass(frozen=True)
class StepCost:
    """
    Attributes:
        seconds: median over the batches, forward and backward.
        megabytes: of memory.
        kind: on a GPU the peak beyond what was allocated before the step; on a CPU, where that is not known, what the
            backward pass needs.
    """

    seconds: float
    megabytes: float
    kind: str


def measure_step(model: nn.Module, batches: List[Any], autocast: bool = False) -> StepCost:
    """Of a model that returns a dict of losses; the first batch is a warm-up."""
    seconds, megabytes = [], 0.0
    for batch in batches:
        _synchronize()
        start = time.perf_counter()
        megabytes = max(megabytes, peak_memory(lambda batch=batch: _step(model, batch, autocast)))
        _synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    kind = "at the peak" if _is_on_gpu() else "kept for the backward pass"
    return StepCost(statistics.median(seconds[1:] or seconds), megabytes, kind)


def _step(model: nn.Module, batch: Any, autocast: bool) -> None:
    with EventStorage(LATE), torch.autocast("cuda", enabled=autocast):
        total = sum(model(batch).values())
    total.backward()


def _is_on_gpu() -> bool:
    """Whether anything is: a GPU may be there, and MODEL.DEVICE be the CPU."""
    return torch.cuda.is_initialized() and torch.cuda.memory_allocated() > 0


def _synchronize() -> None:
    if _is_on_gpu():
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], None]) -> float:
    """MB: on a GPU the most that a step allocates at once, on a CPU what it keeps for its backward pass."""
    if _is_on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    kept: Dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 1e6


def measure_terms(model: nn.Module, student: nn.Module, batches: List[Any], autocast: bool) -> Dict[str, TermCost]:
    """Each loss that a model returns, weighted as it is, and the gradient that it sends to the student."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    seen: Dict[str, List[Tuple[float, float]]] = {}
    for batch in batches:
        with EventStorage(LATE), torch.autocast("cuda", enabled=autocast):
            losses = model(batch)
        for name, loss in losses.items():
            seen.setdefault(name, []).append((loss.item(), _gradient_norm(loss, parameters, autocast)))
    return {name: TermCost(*(statistics.fmean(column) for column in zip(*values))) for name, values in seen.items()}


def _gradient_norm(loss: torch.Tensor, parameters: List[nn.Parameter], autocast: bool) -> float:
    norm = 0.0
    for scale in SCALES if autocast else (1.0,):
        gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        norm = torch.stack(norms).norm().item() / scale if norms else 0.0
        if math.isfinite(norm):
            break
    return norm
