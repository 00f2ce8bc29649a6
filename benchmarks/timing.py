"""Helpers that several benchmarks use, beside `gdetkd.engine.step_costs`."""

import platform
import statistics
from typing import List

import torch

WARM_UP = 3


def quartiles(values: List[float]) -> List[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def machine(device: str) -> str:
    """Return one line that says on which machine a figure was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {name}, torch {torch.__version__}, {device}"


def numbers(text: str) -> List[int]:
    """Parse an argument such as "64,256"."""
    return [int(number) for number in text.split(",")]
