"""SIGTERM saves and ends the run with a code of its own, also in an evaluation and in PreciseBN."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch
from test_processes import run_in_processes
from test_trainer import train

from gdetkd import DistillTrainer
from gdetkd.engine.stopping import EXIT_STOPPED, LOOK_EVERY, LeftEarly, StopRequest
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import read_weights


class Terminated(DistillTrainer):
    """Gets SIGTERM in the middle of an iteration."""

    at = 2

    def run_step(self):
        if self.iter == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().run_step()


def test_sigterm_saves_and_the_run_goes_on_bit_by_bit(distill_cfg, tmp_path):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 6, "INPUT.MIN_SIZE_TRAIN": (48, 64), "DATALOADER.NUM_WORKERS": 1})
    _, uninterrupted = train(DistillTrainer, cfg)
    run = tmp_path / "stopped"
    run.mkdir()
    cfg.OUTPUT_DIR = str(run)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train(Terminated, cfg)
    assert stop.value.code == EXIT_STOPPED == 75 and signal.getsignal(signal.SIGTERM) is before
    assert (run / "last_checkpoint").read_text() == "model_0000002.pth"
    trainer, steps = train(DistillTrainer, cfg, resume=True)
    assert steps == {iteration: uninterrupted[iteration] for iteration in (3, 4, 5)}
    assert trainer.scheduler.last_epoch == 6


def test_sigterm_comes_before_an_evaluation_that_is_made_up_for(distill_cfg, tmp_path, monkeypatch):
    """A cluster may not wait for as long as an evaluation takes."""
    made = []

    def evaluate(cls, cfg, *args):
        made.append(cfg.OUTPUT_DIR)
        return {"bbox": {"AP": float(torch.rand(1))}}  # it has the random state that it would have had

    monkeypatch.setattr(DistillTrainer, "test", classmethod(evaluate))
    keys = {"SOLVER.MAX_ITER": 6, "INPUT.MIN_SIZE_TRAIN": (48, 64), "SOLVER.CHECKPOINT_PERIOD": 100}
    cfg = distill_cfg({**keys, "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 3})
    _, uninterrupted = train(DistillTrainer, cfg)
    best = read_weights(str(tmp_path / "run" / "model_best.pth"))
    run = tmp_path / "stopped"
    run.mkdir()
    cfg.OUTPUT_DIR = str(run)
    with pytest.raises(SystemExit) as stop:
        train(Terminated, cfg)
    assert stop.value.code == EXIT_STOPPED and str(run) not in made and not (run / "model_best.pth").exists()
    _, steps = train(DistillTrainer, cfg, resume=True)
    assert steps == {iteration: uninterrupted[iteration] for iteration in (3, 4, 5)} and made.count(str(run)) == 2
    resumed = read_weights(str(run / "model_best.pth"))
    assert resumed["record"] == best["record"] and resumed["iteration"] == best["iteration"]


def test_a_stop_that_cannot_be_saved_does_not_pretend_to_be(distill_cfg, tmp_path, monkeypatch):
    from gdetkd.engine import checkpoint

    def full(path, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(Terminated):
        def run_step(self):
            if self.iter == self.at:
                monkeypatch.setattr(checkpoint, "written_whole", full)
            super().run_step()

    with pytest.raises(GDetKDError, match="iteration 2 and could NOT be saved.*continues from model_0000001.pth"):
        train(Full, distill_cfg({"SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2}))


def test_sigterm_in_the_last_iteration_lets_the_run_end(distill_cfg, tmp_path):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 3})
    train(Terminated, cfg)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"


class Asks:
    """Sends SIGTERM in the given forward pass of a kind: "evaluation", or "precise" for PreciseBN's."""

    def __init__(self, student, kind, number):
        self.kind, self.number, self.seen = kind, number, 0
        student.register_forward_pre_hook(self._look)

    def _look(self, module, inputs):
        is_kind = not module.training if self.kind == "evaluation" else module.training and not torch.is_grad_enabled()
        self.seen += is_kind
        if is_kind and self.seen == self.number:
            # torchrun and SLURM send it to the processes that load data, too.
            for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                os.kill(process, signal.SIGTERM)


def train_asked(cfg, kind=None, number=0, resume=False):
    """Trains with the seed of the config; the trainer, the state of its student and losses, and the exit code."""
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    asks = Asks(trainer.student, kind, number)
    try:
        trainer.train()
    except SystemExit as stop:
        return trainer, asks, stop.code
    return trainer, asks, 0


def states(trainer):
    return {**trainer.student.state_dict(), **trainer.distiller.losses.state_dict()}


def equal(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def precise_cfg(distill_cfg, tmp_path):
    """A run of four iterations that evaluates, and estimates BatchNorm's statistics on three batches, every second."""

    def make(folder, **changes):
        (tmp_path / folder).mkdir()
        keys = {
            "SOLVER.MAX_ITER": 4,
            "DATASETS.TEST": ("tiny",),
            "TEST.EVAL_PERIOD": 2,
            "INPUT.MIN_SIZE_TRAIN": (48, 64),
        }
        keys.update({"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 3})
        keys.update({"INPUT.MIN_SIZE_TRAIN": (48, 64), "SEED": 5})
        return distill_cfg({**keys, "OUTPUT_DIR": str(tmp_path / folder), **changes})

    return make


# Twelve images are evaluated and three batches estimated from, after two iterations and at the end.
@pytest.mark.parametrize("kind, number", [("evaluation", 5), ("precise", 2), ("evaluation", 17), ("precise", 5)])
def test_sigterm_in_work_that_a_resumed_run_does_again(precise_cfg, kind, number):
    """It is left at once, and the run goes on bit by bit."""
    whole, _, _ = train_asked(precise_cfg("whole"))
    cfg = precise_cfg("stopped")
    _, asks, code = train_asked(cfg, kind, number)
    assert code == EXIT_STOPPED and asks.seen == number  # not one image or batch more
    resumed, asks, code = train_asked(cfg, kind, 100, resume=True)
    assert code == 0 and equal(states(resumed), states(whole))
    each = 12 if kind == "evaluation" else 3
    assert asks.seen == (2 * each if number <= each else each)
    for name in ("model_final.pth", "model_best.pth"):
        first, second = (read_weights(os.path.join(run.cfg.OUTPUT_DIR, name)) for run in (whole, resumed))
        assert equal(first["model"], second["model"]) and first.get("record") == second.get("record")


def test_sigterm_to_all_processes_of_an_evaluation(precise_cfg):
    """Those that load data ignore it, or their end would be an error of the run."""
    cfg = precise_cfg("stopped", **{"DATALOADER.NUM_WORKERS": 1, "TEST.PRECISE_BN.ENABLED": False})
    _, asks, code = train_asked(cfg, "evaluation", 3)
    assert code == EXIT_STOPPED and asks.seen == 3


def test_a_finished_run_that_is_resumed_again_stays_as_it_is(precise_cfg):
    """Its last estimate was interrupted, and a resumed run wrote model_final.pth."""
    cfg = precise_cfg("stopped")
    train_asked(cfg, "precise", 5)
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    for _ in range(2):
        _, asks, code = train_asked(cfg, "precise", 100, resume=True)
        final = read_weights(path)
        assert code == 0 and final["trainer"]["iteration"] == final["iteration"] == 3
    assert asks.seen == 0  # the second time nothing is left to do


def test_sigterm_while_an_evaluation_is_made_up_for(precise_cfg):
    cfg = precise_cfg("stopped", **{"TEST.PRECISE_BN.ENABLED": False})
    whole, _, _ = train_asked(precise_cfg("whole", **{"TEST.PRECISE_BN.ENABLED": False}))
    for number in (5, 3):
        _, asks, code = train_asked(cfg, "evaluation", number, resume=number == 3)
        assert code == EXIT_STOPPED and asks.seen == number
    resumed, asks, code = train_asked(cfg, "evaluation", 100, resume=True)
    assert code == 0 and asks.seen == 24 and equal(states(resumed), states(whole))


def test_precise_bn_is_about_the_student_alone_and_a_resumed_run_is_the_same(precise_cfg):
    """The teacher does not look, nothing enters the queue, and the batches depend on the iteration alone."""
    cfg = precise_cfg("whole", **{"SOLVER.CHECKPOINT_PERIOD": 2})
    looks = []
    trainer = DistillTrainer(cfg)
    look = trainer.distiller.teacher.look
    trainer.distiller.teacher.look = lambda *args: (looks.append(torch.is_grad_enabled()), look(*args))[1]
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert looks == [True] * 4  # one for each iteration
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as file:
        file.write("model_0000001.pth")
    resumed = DistillTrainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert resumed.start_iter == 2 and equal(states(resumed), states(trainer))


def _hears(rank):
    """How long it takes one process to leave its work when another one alone is asked to stop."""
    request = StopRequest()
    with request.listening():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        start, left = time.monotonic(), False
        while not left and time.monotonic() - start < 60:
            try:
                request.leave_if_asked()
            except LeftEarly:
                left = True
            time.sleep(0.01)
        later = StopRequest()
        return left, request.agree(), later.agree()


def test_a_request_to_one_process_reaches_the_others(tmp_path):
    assert LOOK_EVERY <= 5
    assert run_in_processes(_hears, tmp_path, 2) == [(True, True, False)] * 2
