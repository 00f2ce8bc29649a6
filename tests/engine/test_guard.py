"""A loss that is not finite reaches no parameter."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from test_trainer import train

from conftest import make_batch
from gdetkd import DistillTrainer
from gdetkd.engine.guard import NonFiniteError
from gdetkd.losses import CKD
from gdetkd.losses.embedding_queue import EmbeddingQueue
from gdetkd.safe_load import read_weights


def spoil(monkeypatch, calls, value=float("nan")):
    """Make CKD and its gradient infinite or not a number in the given calls."""
    compute, count = CKD.compute, iter(range(100))

    def spoiled(self, student, teacher):
        loss = compute(self, student, teacher)
        return loss * value if next(count) in calls else loss

    monkeypatch.setattr(CKD, "compute", spoiled)


class States(HookBase):
    """Keep the student's state before each step."""

    def __init__(self):
        self.before = {}

    def before_step(self):
        self.before[self.trainer.iter] = {k: v.clone() for k, v in self.trainer.student.state_dict().items()}


def with_states(cfg):
    trainer, states = DistillTrainer(cfg), States()
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([states])
    return trainer, states


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer(distill_cfg, tmp_path, monkeypatch, value):
    spoil(monkeypatch, {2}, value)
    trainer, states = with_states(distill_cfg({"SOLVER.CHECKPOINT_PERIOD": 2, "SOLVER.MAX_ITER": 6}))
    shown = {"nan": "nan", "inf": "inf", "-inf": "-inf"}[str(value)]
    with pytest.raises(NonFiniteError, match=f"At iteration 2 loss_distill_ckd is {shown} .*tiny.*nonfinite_0000002"):
        trainer.train()
    assert same(trainer.student.state_dict(), states.before[2]) and not same(states.before[1], states.before[2])
    report = json.loads((tmp_path / "run" / "nonfinite_0000002.json").read_text())
    (found,) = report["processes"]
    assert report["iteration"] == 2 and found["terms"] == {"loss_distill_ckd": shown}
    assert len(found["files"]) == 2 and all(Path(name).exists() for name in found["files"])
    saved = read_weights(str(tmp_path / "run" / "nonfinite_0000002.pth"))
    assert same(saved["model"], states.before[2]) and saved["trainer"]["iteration"] == saved["iteration"] == 1
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"


def test_batch_statistics_are_restored(distill_cfg, monkeypatch):
    """The forward pass changes them before the losses are known."""
    spoil(monkeypatch, {1})
    trainer, states = with_states(distill_cfg({"MODEL.RESNETS.NORM": "BN"}))
    with pytest.raises(NonFiniteError):
        trainer.train()
    means = [name for name in states.before[1] if name.endswith("running_mean")]
    assert means and not same({name: states.before[0][name] for name in means}, states.before[1])
    assert same(trainer.student.state_dict(), states.before[1])


def test_a_run_can_repeat_the_step_from_the_state_before_it(distill_cfg, tmp_path, monkeypatch):
    """The second time, the step is finite here. The run continues like a run that was not interrupted."""
    cfg = distill_cfg({"SOLVER.MAX_ITER": 6, "INPUT.MIN_SIZE_TRAIN": (48, 64)})
    _, uninterrupted = train(DistillTrainer, cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "spoiled")
    (tmp_path / "spoiled").mkdir()
    with monkeypatch.context() as patch, pytest.raises(NonFiniteError):
        spoil(patch, {2})
        train(DistillTrainer, cfg)
    (tmp_path / "spoiled" / "last_checkpoint").write_text("nonfinite_0000002.pth")
    cfg.DISTILL.SKIP_NONFINITE = 1
    trainer, steps = train(DistillTrainer, cfg, resume=True)
    assert steps == {iteration: uninterrupted[iteration] for iteration in (2, 3, 4, 5)}
    assert trainer._guard.state_dict() == {}  # the step that ended the run does not count as left out


@pytest.mark.parametrize("tolerated", [0, 1])
def test_embeddings_of_a_bad_step_are_not_in_the_queue(distill_cfg, monkeypatch, tolerated):
    pushed, push = [], EmbeddingQueue.push

    def spoiled(queue, embeddings):
        pushed.append(embeddings * (float("nan") if len(pushed) == 2 else 1.0))
        push(queue, pushed[-1])

    monkeypatch.setattr(EmbeddingQueue, "push", spoiled)
    spoil(monkeypatch, {2})
    keys = {"SOLVER.MAX_ITER": 4, "DISTILL.SKIP_NONFINITE": tolerated, "DISTILL.CKD.QUEUE_SIZE": 100}
    trainer, _ = with_states(distill_cfg(keys))
    try:
        trainer.train()
    except NonFiniteError:
        assert not tolerated
    state = trainer.distiller.losses.state_dict()
    expected = torch.cat([embeddings for step, embeddings in enumerate(pushed) if step != 2])
    assert torch.equal(state["CKD.queue.embeddings"][: len(expected)], expected)
    assert state["CKD.queue.filled"] == len(expected) and len(pushed) == (4 if tolerated else 3)


def test_proposals_that_are_not_finite_keep_the_embeddings_of_the_step_before(distill_cfg, monkeypatch):
    """If the forward pass fails, the embeddings that wait to enter the queue belong to the step before."""
    trainer, _ = with_states(distill_cfg({"SOLVER.MAX_ITER": 2, "DISTILL.CKD.QUEUE_SIZE": 100}))
    generator, calls = trainer.student.proposal_generator, iter(range(10))
    forward = type(generator).forward

    def spoiled(self, *args, **kwargs):
        if self is generator and next(calls) == 1:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(generator), "forward", spoiled)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert trainer.distiller.losses.state_dict()["CKD.queue.filled"] > 0


def test_at_most_skip_nonfinite_steps_are_left_out(distill_cfg, caplog, monkeypatch):
    spoil(monkeypatch, {1, 2, 4})
    keys = {"DISTILL.SKIP_NONFINITE": 2, "SOLVER.MAX_ITER": 8}
    trainer, states = with_states(distill_cfg(keys))
    with pytest.raises(NonFiniteError, match="At iteration 4"):
        trainer.train()
    assert same(states.before[1], states.before[3]) and not same(states.before[3], states.before[4])
    assert "2 of the 2 that DISTILL.SKIP_NONFINITE tolerates" in caplog.text
    assert caplog.text.count("The step is left out") == 2


def test_a_resumed_run_continues_to_count_left_out_steps(distill_cfg, monkeypatch):
    spoil(monkeypatch, {1, 3})
    cfg = distill_cfg({"DISTILL.SKIP_NONFINITE": 1, "SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2})
    train(DistillTrainer, cfg, stop_at=2)
    with pytest.raises(NonFiniteError, match="At iteration 3"):
        train(DistillTrainer, cfg, resume=True)


def test_proposals_that_are_not_finite_are_named(distill_cfg, tmp_path, monkeypatch):
    """Detectron2 raises an error for them in the forward pass."""
    trainer, states = with_states(distill_cfg({"DISTILL.SKIP_NONFINITE": 1}))
    generator, calls = trainer.student.proposal_generator, iter(range(10))
    forward = type(generator).forward

    def spoiled(self, *args, **kwargs):
        if self is generator and next(calls) in (1, 2):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(generator), "forward", spoiled)
    with pytest.raises(NonFiniteError, match="At iteration 2 the forward pass is not finite .Predicted boxes"):
        trainer.train()
    assert same(trainer.student.state_dict(), states.before[1]) and (tmp_path / "run/nonfinite_0000002.json").exists()


def test_a_batch_without_file_names_can_be_trained_on(distill_cfg, monkeypatch):
    spoil(monkeypatch, {1})

    class FixedBatches(DistillTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [make_batch(seed=seed) for seed in range(6)]

    with pytest.raises(NonFiniteError, match="no file name"):
        train(FixedBatches, distill_cfg())
