"""What --check measures of a step, where half precision decides over it."""

import math

import pytest
import torch
from torch import nn

from gdetkd.engine.step_costs import SCALES, measure_step, measure_terms


class HalfPrecision(nn.Module):
    """One parameter of n values, cast to half precision before a loss with a gradient of `size` in each."""

    def __init__(self, size, n=64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.size = size

    def forward(self, batch):
        return {"loss": (self.weight.half().float() * self.size).sum()}


@pytest.mark.parametrize("size", [1e-9, 1e-3, 2.0, 300.0])  # the last two are infinite with the largest factor
def test_gradients_are_scaled_as_half_precision_needs_it(size):
    model = HalfPrecision(size)
    cost = measure_terms(model, model, [None], autocast=True)["loss"]
    assert cost.gradient == pytest.approx(size * math.sqrt(64), rel=0.02)


def test_without_a_factor_the_gradient_would_be_lost():
    model = HalfPrecision(1e-9)
    assert measure_terms(model, model, [None], autocast=False)["loss"].gradient == 0.0
    assert SCALES[-1] == 1.0


def test_a_gpu_that_the_model_is_not_on_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cost = measure_step(HalfPrecision(1.0), [None, None])
    assert cost.kind == "kept for the backward pass"


def test_memory_on_a_gpu_is_the_steps_own(monkeypatch):
    for name, value in (("is_initialized", True), ("memory_allocated", 3e6), ("max_memory_allocated", 10e6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    cost = measure_step(HalfPrecision(1.0), [None])
    assert (cost.megabytes, cost.kind) == (pytest.approx(7.0), "at the peak")
