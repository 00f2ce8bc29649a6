"""Mixed precision on a GPU has the losses of a CPU in float32. On a CPU, bfloat16 stands in, for a few pairs."""

import math

import pytest
import torch
from detectron2.engine import HookBase
from on_device import (
    NOTHING_IS_CHOSEN,
    PAIRS,
    PAIRS_ON_CPU,
    TEACHER_KEYS,
    devices_of,
    losses_of,
    make_trainer,
    steady,
    tensors_of,
    train,
    use_amp,
)

STEPS = 3
PRECISIONS = {"cpu": ("bfloat16",), "cuda": ("float32", "float16", "bfloat16")}
# Largest difference from float32 on a CPU, relative to the loss, and in the loss itself. On a CPU, bfloat16
# differs by up to 0.07. A box loss differs by up to 0.012: a proposal that hardly overlaps enough may not count.
HALF = (0.15, 0.02)
TOLERANCES = {"float32": (2e-3, 1e-3), "float16": HALF, "bfloat16": HALF}
# Any loss above 2, times this scale, is infinite in float32.
TOO_LARGE, ORDINARY = 2.0**127, 4.0
CASES = [("cpu", pair) for pair in PAIRS_ON_CPU] + [("cuda", pair) for pair in PAIRS]


def start(pair_cfg, pair, device, precision):
    """Return the trainer of a pair in a precision, with the same student on every device."""
    keys = {**NOTHING_IS_CHOSEN, "DISTILL.LOSSES": losses_of(pair), "SOLVER.MAX_ITER": STEPS, "MODEL.DEVICE": device}
    amp = {"SOLVER.AMP.ENABLED": True, "DISTILL.TEACHER.DTYPE": precision} if precision != "float32" else {}
    return make_trainer(steady(pair_cfg(pair, {**keys, **amp}, teacher=TEACHER_KEYS)))


@pytest.mark.parametrize("device, pair", CASES, indirect=["device"])
def test_three_steps_have_the_losses_of_a_cpu(pair_cfg, monkeypatch, device, pair):
    expected = train(start(pair_cfg, pair, "cpu", "float32"))
    for precision in PRECISIONS[device]:
        relative, absolute = TOLERANCES[precision]
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "allow_tf32", False)
            if precision != "float32":
                use_amp(patch, device, getattr(torch, precision))
            trainer = start(pair_cfg, pair, device, precision)
            teacher = trainer.distiller.teacher
            before = tensors_of(teacher)
            found = train(trainer)
        assert len(found) == STEPS
        for losses, reference in zip(found, expected):
            assert losses == pytest.approx(reference, rel=relative, abs=absolute), precision
        after = tensors_of(teacher)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert devices_of(trainer.distiller) == devices_of(teacher.model) == {device}


class Overflow(HookBase):
    """Note after each step whether it changed a parameter, and the scale. After the first step, lower the scale."""

    def __init__(self):
        self.changed, self.scales = [], []

    def before_step(self):
        self._before = [parameter.detach().clone() for parameter in self.trainer.distiller.parameters()]

    def after_step(self):
        after = self.trainer.distiller.parameters()
        self.changed.append(not all(torch.equal(*pair) for pair in zip(self._before, after)))
        scaler = self.trainer._trainer.grad_scaler
        self.scales.append(scaler.get_scale())
        if self.trainer.iter == 0:
            scaler.load_state_dict({**scaler.state_dict(), "scale": ORDINARY})


def test_the_first_overflow_skips_the_step_and_lowers_the_scale(pair_cfg, monkeypatch, device):
    """GradScaler starts with a scale that may be too large. The losses are finite, so the guard counts no step."""
    precision = {"cpu": "bfloat16", "cuda": "float16"}[device]
    use_amp(monkeypatch, device, getattr(torch, precision))
    trainer = start(pair_cfg, "faster_rcnn-faster_rcnn", device, precision)
    scaler = trainer._trainer.grad_scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": TOO_LARGE})
    overflow = Overflow()
    trainer.register_hooks([overflow])
    losses = train(trainer)
    assert overflow.changed == [False, True, True]
    assert overflow.scales == [TOO_LARGE / 2, ORDINARY, ORDINARY]
    assert trainer._guard.state_dict() == {}
    assert all(math.isfinite(value) for step in losses for value in step.values())
