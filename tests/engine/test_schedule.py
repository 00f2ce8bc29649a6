"""DISTILL.EVERY: steps without terms are the student's own, also in several processes and when a step fails."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too
import json

import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, make_batch
from gdetkd import DistillTrainer
from gdetkd.engine.step_costs import LATE
from test_processes import have_equal_parameters, run_in_processes, train_rank
from test_trainer import train
from test_unlabeled_runs import unlabeled_cfg  # noqa: F401  a fixture

TERMS = {f"loss_distill_{name.lower()}" for name in ALL_LOSSES}


def output_at(trainer, iteration, batch):
    with EventStorage(iteration):
        torch.manual_seed(0)
        return trainer.model.train()(batch)


def test_only_every_third_step_has_terms_and_runs_the_teacher(distill_cfg, monkeypatch):
    trainer = DistillTrainer(distill_cfg({"DISTILL.EVERY": 3}))
    calls = []
    extract = trainer.distiller.teacher.extract
    monkeypatch.setattr(trainer.distiller.teacher, "extract", lambda batch: (calls.append(1), extract(batch))[1])
    found = [TERMS & set(output_at(trainer, iteration, make_batch())) for iteration in range(6)]
    assert found == [set(), set(), TERMS] * 2 and len(calls) == 2


def test_the_other_steps_are_the_students_own_and_reach_each_parameter(distill_cfg):
    cfg = distill_cfg({"DISTILL.EVERY": 2})
    trainer = DistillTrainer(cfg)
    plain = DistillTrainer(distill_cfg({"DISTILL.LOSSES": ()}))
    plain.student.load_state_dict(trainer.student.state_dict())
    losses = output_at(trainer, 0, make_batch())
    assert losses == output_at(plain, 0, make_batch())
    sum(losses.values()).backward()
    learned = list(trainer.distiller.losses.parameters())
    assert learned and all(p.grad is not None and not p.grad.any() for p in learned)


def test_the_terms_are_the_same_as_without_the_key(distill_cfg):
    first, second = (DistillTrainer(distill_cfg({"DISTILL.EVERY": every})) for every in (1, 2))
    second.distiller.load_state_dict(first.distiller.state_dict())
    assert output_at(first, 1, make_batch()) == output_at(second, 1, make_batch())


def test_a_resumed_run_is_bit_identical_and_logs_only_steps_with_terms(distill_cfg, tmp_path):
    keys = {"DISTILL.EVERY": 3, "DISTILL.WEIGHTS": "auto", "DISTILL.AUTO.PERIOD": 4, "SOLVER.BASE_LR": 1e-5}
    cfg = distill_cfg({**keys, "SOLVER.MAX_ITER": 21, "SOLVER.CHECKPOINT_PERIOD": 7})
    whole, losses = train(DistillTrainer, cfg)
    assert [
        step
        for step in losses
        if losses[step].get("raw/loss_distill_ckd") != losses.get(step - 1, {}).get("raw/loss_distill_ckd")
    ] == list(range(2, 21, 3))
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000006.pth")
    (tmp_path / "run" / "model_final.pth").unlink()
    resumed, again = train(DistillTrainer, cfg, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed.distiller.parameters(), whole.distiller.parameters()))
    assert resumed.schedule.scalars() == whole.schedule.scalars()
    assert all(weight > 0 for weight in whole.schedule.scalars().values())


class _FailsTwice(DistillTrainer):
    """The forward pass of rank 1 is not finite in a step without terms, and in one with terms."""

    def __init__(self, cfg):
        super().__init__(cfg)
        forward, calls = self.student.forward, []

        def fail(batch):
            calls.append(batch)
            if len(calls) in (3, 4) and comm.get_rank() == 1:
                raise FloatingPointError("not finite")
            return forward(batch)

        self.student.forward = fail


def _train(rank, cfg):
    return train_rank(rank, cfg, _FailsTwice)


@pytest.mark.parametrize("weights", ["fixed", "auto"])
def test_two_processes_stay_together_when_steps_fail(shared_cfg, tmp_path, weights):
    keys = {"DISTILL.EVERY": 2, "DISTILL.WEIGHTS": weights, "DISTILL.AUTO.PERIOD": 2, "DISTILL.SKIP_NONFINITE": 2}
    results = run_in_processes(_train, tmp_path, 2, shared_cfg(2, {**keys, "SOLVER.MAX_ITER": 8}))
    assert have_equal_parameters(results) and all(result["changed"] for result in results)


def test_with_unlabeled_images_a_step_without_terms_has_both_parts(unlabeled_cfg):  # noqa: F811
    trainer = DistillTrainer(unlabeled_cfg({"DISTILL.EVERY": 2}))
    batch = next(iter(trainer.data_loader))
    without, having = (output_at(trainer, iteration, batch) for iteration in (0, 1))
    assert set(having) - set(without) == TERMS
    assert {name: having[name] for name in without} == without


def test_costs_are_measured_in_steps_with_terms():
    assert all((LATE + 1) % every == 0 for every in range(1, 17))


def test_metrics_have_the_terms(distill_cfg, tmp_path):
    train(DistillTrainer, distill_cfg({"DISTILL.EVERY": 3, "SOLVER.MAX_ITER": 20, "SOLVER.BASE_LR": 1e-5}))
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert line["loss_distill_sgfi"] > 0 and line["raw/loss_distill_sgfi"] > 0
