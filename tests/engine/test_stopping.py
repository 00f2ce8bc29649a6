"""SIGTERM saves a run and ends it with its own exit code, also in an evaluation and in PreciseBN."""

import gdetkd  # noqa: F401, I001  imported first, also in the spawned processes
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
    """Get SIGTERM in the middle of an iteration."""

    at = 2

    def run_step(self):
        if self.iter == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        super().run_step()


def test_sigterm_saves_and_a_resumed_run_is_bit_identical(distill_cfg, tmp_path):
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


def test_sigterm_skips_a_due_evaluation_and_a_resumed_run_makes_it(distill_cfg, tmp_path, monkeypatch):
    """A cluster may not wait until an evaluation is done."""
    made = []

    def evaluate(cls, cfg, *args):
        made.append(cfg.OUTPUT_DIR)
        return {"bbox": {"AP": float(torch.rand(1))}}  # equal in both runs only if the random state is restored

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


def test_sigterm_on_a_full_disk_is_an_error(distill_cfg, tmp_path, monkeypatch):
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


class SendSigterm:
    """Send SIGTERM in a forward pass of a kind.

    Args:
        kind: "evaluation", or "precise" for a forward pass of PreciseBN.
        number: number of the forward pass of that kind, from 1.
    """

    def __init__(self, student, kind, number):
        self.kind, self.number, self.seen = kind, number, 0
        student.register_forward_pre_hook(self._look)

    def _look(self, module, inputs):
        is_kind = not module.training if self.kind == "evaluation" else module.training and not torch.is_grad_enabled()
        self.seen += is_kind
        if is_kind and self.seen == self.number:
            # torchrun and SLURM send the signal to data workers, too.
            for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                os.kill(process, signal.SIGTERM)


def train_with_sigterm(cfg, kind=None, number=0, resume=False):
    """Train with the seed of the config. Return the trainer, the sender of the signal, and the exit code."""
    torch.manual_seed(0)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    sender = SendSigterm(trainer.student, kind, number)
    try:
        trainer.train()
    except SystemExit as stop:
        return trainer, sender, stop.code
    return trainer, sender, 0


def states(trainer):
    return {**trainer.student.state_dict(), **trainer.distiller.losses.state_dict()}


def equal(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def precise_cfg(distill_cfg, tmp_path):
    """Return a function that makes the config of a run of four iterations.

    After every second iteration, the run evaluates, and estimates BatchNorm's statistics on three batches.
    """

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


# After two iterations and at the end, the run evaluates twelve images and uses three batches for PreciseBN.
@pytest.mark.parametrize("kind, number", [("evaluation", 5), ("precise", 2), ("evaluation", 17), ("precise", 5)])
def test_sigterm_interrupts_work_that_a_resumed_run_repeats(precise_cfg, kind, number):
    """The work stops at once, and the resumed run is bit-identical to an uninterrupted run."""
    whole, _, _ = train_with_sigterm(precise_cfg("whole"))
    cfg = precise_cfg("stopped")
    _, sender, code = train_with_sigterm(cfg, kind, number)
    assert code == EXIT_STOPPED and sender.seen == number  # no further image or batch
    resumed, sender, code = train_with_sigterm(cfg, kind, 100, resume=True)
    assert code == 0 and equal(states(resumed), states(whole))
    passes = 12 if kind == "evaluation" else 3
    assert sender.seen == (2 * passes if number <= passes else passes)
    for name in ("model_final.pth", "model_best.pth"):
        first, second = (read_weights(os.path.join(run.cfg.OUTPUT_DIR, name)) for run in (whole, resumed))
        assert equal(first["model"], second["model"]) and first.get("record") == second.get("record")


def test_data_workers_ignore_a_sigterm_to_all_processes(precise_cfg):
    """Otherwise the end of a data worker would be an error of the run."""
    cfg = precise_cfg("stopped", **{"DATALOADER.NUM_WORKERS": 1, "TEST.PRECISE_BN.ENABLED": False})
    _, sender, code = train_with_sigterm(cfg, "evaluation", 3)
    assert code == EXIT_STOPPED and sender.seen == 3


def test_resuming_a_finished_run_changes_nothing(precise_cfg):
    """The last estimate of the run was interrupted, and the first resumed run wrote model_final.pth."""
    cfg = precise_cfg("stopped")
    train_with_sigterm(cfg, "precise", 5)
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    for _ in range(2):
        _, sender, code = train_with_sigterm(cfg, "precise", 100, resume=True)
        final = read_weights(path)
        assert code == 0 and final["trainer"]["iteration"] == final["iteration"] == 3
    assert sender.seen == 0  # the second resumed run has nothing left to do


def test_sigterm_while_a_resumed_run_repeats_an_evaluation(precise_cfg):
    cfg = precise_cfg("stopped", **{"TEST.PRECISE_BN.ENABLED": False})
    whole, _, _ = train_with_sigterm(precise_cfg("whole", **{"TEST.PRECISE_BN.ENABLED": False}))
    for number in (5, 3):
        _, sender, code = train_with_sigterm(cfg, "evaluation", number, resume=number == 3)
        assert code == EXIT_STOPPED and sender.seen == number
    resumed, sender, code = train_with_sigterm(cfg, "evaluation", 100, resume=True)
    assert code == 0 and sender.seen == 24 and equal(states(resumed), states(whole))


def test_precise_bn_uses_only_the_student_and_a_resumed_run_is_the_same(precise_cfg):
    """PreciseBN does not call the teacher or push into the queue. Its batches depend only on the iteration."""
    cfg = precise_cfg("whole", **{"SOLVER.CHECKPOINT_PERIOD": 2})
    looks = []
    trainer = DistillTrainer(cfg)
    look_at = trainer.distiller.teacher.look_at
    trainer.distiller.teacher.look_at = lambda *args: (looks.append(torch.is_grad_enabled()), look_at(*args))[1]
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert looks == [True] * 4  # one for each iteration
    with open(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"), "w") as file:
        file.write("model_0000001.pth")
    resumed = DistillTrainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert resumed.start_iter == 2 and equal(states(resumed), states(trainer))


def _leave_on_request(rank):
    """Work until this process or the other one is asked to stop. Only rank 1 gets the signal.

    Returns:
        whether this process left its work, whether the processes agree to stop, and whether a later request is set.
    """
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


def test_a_request_to_one_process_reaches_all_processes(tmp_path):
    assert LOOK_EVERY <= 1  # second
    assert run_in_processes(_leave_on_request, tmp_path, 2) == [(True, True, False)] * 2
