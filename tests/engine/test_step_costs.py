"""Test the time, memory and gradients of a step that --check measures."""

import math

import pytest
import torch
from torch import nn

from gdetkd.engine.step_costs import SCALES, measure_steps, measure_terms, time_in_rounds


class HalfPrecision(nn.Module):
    """Have a parameter of n values that is cast to half precision. Each value has a gradient of `size`."""

    def __init__(self, size, n=64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.size = size

    def forward(self, batch):
        return {"loss": (self.weight.half().float() * self.size).sum()}


@pytest.mark.parametrize("size", [1e-9, 1e-3, 2.0, 300.0])  # the last two are infinite with the largest factor
def test_gradients_in_half_precision_are_scaled_to_be_finite_and_not_0(size):
    model = HalfPrecision(size)
    cost = measure_terms(model, model, [None], autocast=True)["loss"]
    assert cost.gradient == pytest.approx(size * math.sqrt(64), rel=0.02)


def test_a_small_gradient_is_0_without_a_factor():
    model = HalfPrecision(1e-9)
    assert measure_terms(model, model, [None], autocast=False)["loss"].gradient == 0.0
    assert SCALES[-1] == 1.0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_without_a_gradient_has_a_norm_of_0(autocast):
    class Zero(HalfPrecision):
        def forward(self, batch):
            return {**super().forward(batch), "zero": torch.zeros(())}

    model = Zero(1.0)
    assert measure_terms(model, model, [None], autocast)["zero"].gradient == 0.0


def test_memory_of_a_model_on_the_cpu_is_measured_on_the_cpu_also_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cost = measure_steps({"model": HalfPrecision(1.0)}, [None, None])["model"]
    assert cost.kind == "kept for the backward pass"


def test_memory_on_a_gpu_is_the_peak_beyond_the_memory_before_the_step(monkeypatch):
    for name, value in (("is_initialized", True), ("memory_allocated", 3e6), ("max_memory_allocated", 10e6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    cost = measure_steps({"model": HalfPrecision(1.0)}, [None, None])["model"]
    assert (cost.megabytes, cost.kind) == (pytest.approx(7.0), "at the peak")


def test_pieces_of_work_take_turns_and_the_warm_up_is_left_out():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    seconds = time_in_rounds(works, rounds=3, warm_up=2)
    assert done == list("abc") * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_models_are_measured_in_turn_on_the_same_batches():
    seen = []

    class Noting(HalfPrecision):
        def __init__(self, name):
            super().__init__(1.0)
            self.name = name

        def forward(self, batch):
            seen.append((self.name, batch))
            return super().forward(batch)

    costs = measure_steps({"plain": Noting("plain"), "step": Noting("step")}, [1, 2])
    assert seen == [("plain", 1), ("step", 1), ("plain", 2), ("step", 2)]
    assert list(costs) == ["plain", "step"] and costs["plain"].megabytes == costs["step"].megabytes
