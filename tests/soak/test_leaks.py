"""A long run needs no more memory, files and hooks at its end than at its start."""

import gc
import os
import resource
import statistics

import pytest
from detectron2.engine import HookBase

from conftest import ALL_LOSSES
from gdetkd import DistillTrainer

PAGE = resource.getpagesize()
# Detectron2 keeps every scalar of every iteration for smoothing. This memory may grow.
HISTORY_BYTES_A_STEP = 6000


class Watch(HookBase):
    """Record resident memory (bytes), open files and registered hooks every few iterations."""

    def __init__(self, period):
        self.period, self.memory, self.files, self.hooks = period, [], [], []

    def after_step(self):
        if (self.trainer.iter + 1) % self.period:
            return
        gc.collect()
        with open("/proc/self/statm") as file:
            self.memory.append(int(file.read().split()[1]) * PAGE)
        self.files.append(len(os.listdir("/proc/self/fd")))
        modules = [*self.trainer.model.modules(), *self.trainer.distiller.teacher.model.modules()]
        self.hooks.append(
            len(self.trainer._hooks) + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        )


def check_run(distill_cfg, steps, period, allowed):
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": steps // 4, "SOLVER.CHECKPOINT_PERIOD": steps // 4}
    keys.update({"SOLVER.MAX_ITER": steps, "SOLVER.STEPS": (), "SOLVER.BASE_LR": 1e-5, "DISTILL.LOSSES": ALL_LOSSES})
    trainer, watch = DistillTrainer(distill_cfg(keys)), Watch(period)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([watch])
    trainer.train()
    quarter = len(watch.memory) // 4
    first, last = statistics.median(watch.memory[:quarter]), statistics.median(watch.memory[-quarter:])
    print(f"{steps} steps: {first / 1e6:.1f} MB in the first quarter, {last / 1e6:.1f} MB in the last")
    assert len(set(watch.hooks)) == 1 and watch.hooks[0] > 0
    assert watch.files[-1] <= watch.files[2 * quarter]  # a writer opens its file when it first writes
    assert last - first < allowed + HISTORY_BYTES_A_STEP * steps


def test_sixty_steps(distill_cfg):
    check_run(distill_cfg, 60, 3, allowed=40e6)


@pytest.mark.soak
def test_two_thousand_steps(distill_cfg):
    check_run(distill_cfg, 2000, 20, allowed=20e6)
