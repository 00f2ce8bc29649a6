"""Pieces of work timed one after another in every round, so that what else the machine does falls on all alike."""

import platform
import statistics
import time
from typing import Any, Callable, Dict, List

import torch

WARM_UP = 3


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(works: Dict[str, Callable[[], Any]], rounds: int, warm_up: int = WARM_UP) -> Dict[str, List[float]]:
    """Seconds of each piece of work in every round, without the rounds of warm-up."""
    seconds: Dict[str, List[float]] = {name: [] for name in works}
    for _ in range(warm_up + rounds):
        for name, work in works.items():
            start = now()
            work()
            seconds[name].append(now() - start)
    return {name: values[warm_up:] for name, values in seconds.items()}


def quartiles(values: List[float]) -> List[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {name}, torch {torch.__version__}, {device}"


def numbers(text: str) -> List[int]:
    """Of an argument such as "64,256"."""
    return [int(number) for number in text.split(",")]
