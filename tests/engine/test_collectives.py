"""Every process makes the same exchanges in the same order, whatever is due, skipped or interrupted.

Otherwise a run would hang. The test runs real trainings in 2 and 3 processes (gloo), records each exchange on each
rank, and compares the records.
"""

import gdetkd  # noqa: F401, I001  imported first, also in the spawned processes
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from gdetkd import DistillTrainer
from gdetkd.data import register_datasets
from gdetkd.engine.stopping import EXIT_STOPPED
from gdetkd.losses import CKD
from test_processes import run_in_processes

EXCHANGES = ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "gather", "gather_object")


class Recorder:
    """Record the exchanges of this process while the context is open: function, and file and name of the caller.

    Attributes:
        record: the exchanges in order. `Steps` adds a mark for each step.
    """

    def __init__(self):
        self.record = []

    def __enter__(self):
        self._originals = {name: getattr(dist, name) for name in EXCHANGES}
        for name, original in self._originals.items():
            setattr(dist, name, self._recording(name, original))
        return self

    def __exit__(self, *exc_info):
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _recording(self, name, original):
        def exchange(*args, **kwargs):
            code = sys._getframe(1).f_code
            self.record.append((name, os.path.basename(code.co_filename), code.co_name))
            return original(*args, **kwargs)

        return exchange


class Steps(HookBase):
    """Mark the steps in the record, and send SIGTERM to one rank in the given iteration."""

    def __init__(self, record, stop_at):
        self.record, self.stop_at = record, stop_at

    def before_step(self):
        self.record.append(f"step {self.trainer.iter}")
        if self.trainer.iter == self.stop_at and comm.get_rank() == comm.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _spoil_ckd(monkeypatch, iteration):
    """Make the CKD term of one rank and iteration not a number."""
    compute = CKD.compute

    def spoiled(self, student, teacher):
        loss = compute(self, student, teacher)
        is_here = comm.get_rank() == comm.get_world_size() - 1 and next(calls) == iteration
        return loss * float("nan") if is_here else loss

    calls = iter(range(100))
    monkeypatch.setattr(CKD, "compute", spoiled)


def _run(cfg, stop_at=None, spoil_at=None, resume=False):
    """Train in this process. Return the recorded exchanges and the exit code."""
    with Recorder() as recorder, pytest.MonkeyPatch.context() as monkeypatch:
        # Drawing the page takes seconds, and only the main process draws it.
        monkeypatch.setattr("gdetkd.insight.hook.Insight.write_page", lambda self: None)
        if spoil_at is not None:
            _spoil_ckd(monkeypatch, spoil_at)
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.register_hooks([Steps(recorder.record, stop_at)])
        code = 0
        try:
            trainer.train()
        except SystemExit as stop:
            code = stop.code
    return {"record": recorder.record, "code": code, "skipped": trainer._guard.state_dict().get("skipped", 0)}


def _run_all(rank, cfg, runs):
    torch.manual_seed(0)
    register_datasets(cfg)
    results = []
    for number, (changes, keywords) in enumerate(runs):
        run_cfg = cfg.clone()
        run_cfg.merge_from_list([item for pair in changes.items() for item in pair])
        run_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, str(number))
        os.makedirs(run_cfg.OUTPUT_DIR, exist_ok=True)
        results.append(_run(run_cfg, **keywords))
        if results[-1]["code"] == EXIT_STOPPED:
            results.append(_run(run_cfg, resume=True))
    return results


def periods(checkpoint, evaluation, insight=0, precise=False):
    return {
        "DISTILL.WEIGHTS": "auto" if insight else "fixed",
        "DISTILL.AUTO.PERIOD": 2,
        "SOLVER.CHECKPOINT_PERIOD": checkpoint,
        "TEST.EVAL_PERIOD": evaluation,
        "DISTILL.INSIGHT.PERIOD": insight,
        "TEST.PRECISE_BN.ENABLED": precise,
    }


# Some of these periods coincide at iteration 2 or 4, and others do not.
PERIODS = [periods(*some) for some in [(2, 2, 2), (2, 2, 0), (2, 3, 0), (3, 2, 3), (3, 2, 2), (2, 3, 2), (3, 3, 0)]]
TOGETHER, APART, PRECISE = periods(2, 2, 2), periods(3, 2, 0), periods(2, 2, 0, precise=True)


@pytest.fixture
def run_all(shared_cfg, tmp_path):
    """Return a function that runs trainings of four iterations in several processes.

    The function returns the results by run. Each result is a tuple by rank.
    """

    def run(world_size, runs):
        (tiny,) = shared_cfg(world_size).DATASETS.REGISTER
        few = {**tiny, "name": "few", "limit": 4}
        keys = {"DATASETS.REGISTER": [tiny, few], "DATASETS.TEST": ("few",), "DISTILL.LOSSES": ("CKD",)}
        keys.update({"SOLVER.MAX_ITER": 4, "DISTILL.INSIGHT.IMAGES": 1, "TEST.PRECISE_BN.NUM_ITER": 2})
        cfg = shared_cfg(world_size, {**keys, "DISTILL.SKIP_NONFINITE": 1})
        return list(zip(*run_in_processes(_run_all, tmp_path, world_size, cfg, runs)))

    return run


def test_the_exchanges_are_the_same_on_every_rank(run_all):
    """Test periods that coincide, a skipped step, and SIGTERM to one rank in each iteration.

    SIGTERM in the last iteration interrupts the evaluation. Each stopped run is then resumed.
    """
    whole = [(changes, {}) for changes in [*PERIODS, PRECISE]]
    skipping = [(TOGETHER, {"spoil_at": 1}), (PRECISE, {"spoil_at": 2})]
    stopped = [(TOGETHER, {"stop_at": iteration}) for iteration in range(4)]
    stopped += [(APART, {"stop_at": 1}), (APART, {"stop_at": 2}), (PRECISE, {"stop_at": 1}), (PRECISE, {"stop_at": 3})]
    results = run_all(3, [*whole, *skipping, *stopped])
    for by_rank in results:
        first, *others = (result["record"] for result in by_rank)
        assert all(other == first for other in others)
        assert len({result["code"] for result in by_rank}) == 1
    count = len(whole) + len(skipping)
    assert all(by_rank[0]["code"] == 0 and "step 3" in by_rank[0]["record"] for by_rank in results[:count])
    assert [by_rank[0]["skipped"] for by_rank in results[:count]] == [0] * len(whole) + [1] * len(skipping)
    assert [by_rank[0]["code"] for by_rank in results[count:]] == [EXIT_STOPPED, 0] * len(stopped)
