"""Time pieces of work in turn, and measure the cost of a step and the gradient of each loss."""

import math
import statistics
import time
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Callable, Dict, List, Mapping, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from .gradients import OWN, term_gradients

# An iteration after every warm-up.
LATE = 10**9
# Factors on a loss in half precision. A small gradient is 0 without a factor, and a large gradient infinite with it.
SCALES = (2.0**16, 2.0**8, 1.0)


@dataclass(frozen=True)
class TermCost:
    """Hold the cost of a loss.

    Attributes:
        weighted: value of the weighted loss, mean over the batches.
        gradient: norm of the loss's gradient in the student's parameters, mean over the batches.
    """

    weighted: float
    gradient: float


@dataclass(frozen=True)
class StepCost:
    """Hold the cost of a step.

    Attributes:
        seconds: median over the batches, forward and backward.
        megabytes: memory.
        kind: which memory. On a GPU it is the peak beyond what was allocated before the step. On a CPU that is not
            known, so it is what the backward pass needs.
    """

    seconds: float
    megabytes: float
    kind: str


def now() -> float:
    """Return the time in seconds, after the GPU has done its work."""
    if is_on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_rounds(works: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int) -> Dict[str, List[float]]:
    """Time pieces of work one after another in every round, so that other work on the machine slows all of them alike.

    Returns:
        seconds of each piece of work in every round, without the rounds of warm-up.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in works}
    for _ in range(warm_up + rounds):
        for name, work in works.items():
            start = now()
            work()
            seconds[name].append(now() - start)
    return {name: values[warm_up:] for name, values in seconds.items()}


def measure_steps(models: Mapping[str, nn.Module], batches: List[Any], autocast: bool = False) -> Dict[str, StepCost]:
    """Measure a step of each model, all models in turn on each batch. Nothing is updated.

    Args:
        models: models that return a dict of losses.
        batches: at least two; the first one is a warm-up.
        autocast: whether the forward pass runs in half precision.
    """
    megabytes = dict.fromkeys(models, 0.0)

    def work(name: str, model: nn.Module) -> Callable[[], None]:
        upcoming = cycle(batches)

        def run() -> None:
            batch = next(upcoming)
            megabytes[name] = max(megabytes[name], peak_memory(lambda: backward(model, batch, autocast)))
            model.zero_grad(set_to_none=True)

        return run

    works = {name: work(name, model) for name, model in models.items()}
    seconds = time_in_rounds(works, rounds=len(batches) - 1, warm_up=1)
    kind = "at the peak" if is_on_gpu() else "kept for the backward pass"
    return {name: StepCost(statistics.median(seconds[name]), megabytes[name], kind) for name in models}


def backward(model: nn.Module, batch: Any, autocast: bool) -> None:
    """Run the forward and backward pass of a step."""
    with EventStorage(LATE), torch.autocast("cuda", enabled=autocast):
        total = sum(model(batch).values())
    total.backward()


def is_on_gpu() -> bool:
    """Return whether any tensor is on a GPU. A machine with a GPU may train on the CPU (MODEL.DEVICE)."""
    return torch.cuda.is_initialized() and torch.cuda.memory_allocated() > 0


def peak_memory(step: Callable[[], None]) -> float:
    """Return the MB that a step allocates at once on a GPU, or keeps for its backward pass on a CPU."""
    if is_on_gpu():
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
    """Return the value of each loss that a model returns, and the norm of its gradient in the student."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    seen: Dict[str, List[Tuple[float, float]]] = {}
    for batch in batches:
        with EventStorage(LATE), torch.autocast("cuda", enabled=autocast):
            losses = model(batch)
        for name, loss in losses.items():
            seen.setdefault(name, []).append((loss.item(), _gradient_norm(loss, parameters, autocast)))
    return {name: TermCost(*(statistics.fmean(column) for column in zip(*values))) for name, values in seen.items()}


def _gradient_norm(loss: torch.Tensor, parameters: List[nn.Parameter], autocast: bool) -> float:
    """Return the norm of a loss's gradient, or NaN if it is not finite at any scale."""
    for scale in SCALES if autocast else (1.0,):
        measured = term_gradients({OWN: loss}, (), parameters, scale)
        if measured:
            return measured[OWN]["norm"]
    return math.nan
