"""DISTILL.UNTIL: after a share of the iterations, the student trains alone."""

import gdetkd  # noqa: F401, I001  first, in the spawned processes too

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, make_batch
from gdetkd import DistillTrainer, GDetKD
from gdetkd.engine.check import Check
from gdetkd.errors import GDetKDError
from gdetkd.study.comparison import Comparison
from gdetkd.study.step_time import measure_pair
from test_feature_cache import counted
from test_processes import fail_on_rank_1, have_equal_parameters, run_in_processes, train_rank

UNTIL = {"DISTILL.UNTIL": 0.5, "SOLVER.BASE_LR": 1e-5}
AUTO = {"DISTILL.WEIGHTS": "auto", "DISTILL.AUTO.PERIOD": 2}


class _Losses(HookBase):
    """Keep the losses of each iteration."""

    def __init__(self):
        self.steps = {}

    def after_step(self):
        latest = self.trainer.storage.latest().items()
        self.steps[self.trainer.iter] = {
            name: value for name, (value, step) in latest if "loss" in name and step == self.trainer.iter
        }


def train(trainer, resume=False):
    """Train with a fixed seed, and return the losses by iteration."""
    trainer.resume_or_load(resume=resume)
    losses = _Losses()
    trainer.register_hooks([losses])
    trainer.train()
    return losses.steps


def made(cfg):
    seed_all_rng(cfg.SEED)
    return DistillTrainer(cfg)


def plain_step(cfg):
    """Return a distiller that took a step without distillation, and the losses."""
    torch.manual_seed(0)
    model = GDetKD(cfg).train()
    model.distils = False
    torch.manual_seed(1)
    with EventStorage():
        losses = model(make_batch())
    sum(losses.values()).backward()
    return model, losses


@pytest.mark.parametrize("student", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_a_step_without_distillation_is_the_plain_students(pair_cfg, student):
    model, losses = plain_step(pair_cfg(f"faster_rcnn-{student}"))
    plain, expected = plain_step(pair_cfg(f"faster_rcnn-{student}", {"DISTILL.LOSSES": ()}))
    assert losses == expected and model.terms == []
    gradients = {name: parameter.grad for name, parameter in plain.student.named_parameters()}
    for name, parameter in model.student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    # DDP waits for the gradient of each parameter.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.losses.parameters())


def test_half_of_the_iterations_distil(distill_cfg, caplog):
    caplog.set_level("INFO")
    trainer = made(distill_cfg({**UNTIL, "SOLVER.MAX_ITER": 7}))
    passes = counted(trainer.distiller.teacher)
    losses = train(trainer)
    with_terms = [step for step, values in losses.items() if "loss_distill_sgfi" in values]
    assert with_terms == [0, 1, 2, 3] and passes == [2, 2, 2, 2]
    assert all("loss_cls" in values for values in losses.values())
    assert caplog.text.count("From iteration 4 on, the student trains without distillation") == 1


@pytest.mark.parametrize("keys", [{}, AUTO, {"DISTILL.WARMUP_ITERS": 12}])
def test_a_resumed_run_is_bit_identical(distill_cfg, tmp_path, keys):
    cfg = distill_cfg({**UNTIL, **keys, "SOLVER.MAX_ITER": 24, "SOLVER.CHECKPOINT_PERIOD": 4})
    losses = train(made(cfg))
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000015.pth")
    (tmp_path / "run" / "model_final.pth").unlink()
    again = train(made(cfg), resume=True)
    assert again == {step: values for step, values in losses.items() if step >= 16}


def test_images_without_labels_train_to_the_end(distill_cfg, pseudo_entry):
    entries = [dict(MetadataCatalog.get("tiny").gdetkd_entry), pseudo_entry()]
    keys = {"DATASETS.REGISTER": entries, "DATASETS.UNLABELED": ("pseudo",), "SOLVER.IMS_PER_BATCH": 4}
    losses = train(made(distill_cfg({**UNTIL, **keys, "SOLVER.MAX_ITER": 6})))
    assert [step for step, values in losses.items() if "loss_distill_ckd" in values] == [0, 1, 2]
    assert all("unlabeled/loss_cls" in values for values in losses.values())


class _FailsTwice(DistillTrainer):
    """The forward pass of rank 1 is not finite in a step with distillation, and in a step without it."""

    def __init__(self, cfg):
        super().__init__(cfg)
        fail_on_rank_1(self, before=[4], after=[8])


def _train_with_failures(rank, cfg):
    return train_rank(rank, cfg, _FailsTwice)


@pytest.mark.parametrize("keys", [{}, AUTO])
def test_two_processes_stay_together_although_one_fails(shared_cfg, tmp_path, keys):
    changes = {**UNTIL, **keys, "SOLVER.MAX_ITER": 10, "DISTILL.SKIP_NONFINITE": 2, "DISTILL.LOSSES": ALL_LOSSES}
    results = run_in_processes(_train_with_failures, tmp_path, 2, shared_cfg(2, changes))
    assert have_equal_parameters(results) and all(result["changed"] for result in results)
    assert [result["skipped"] for result in results] == [2, 2]


def test_the_time_of_a_step_is_the_mean_over_the_iterations(distill_cfg, monkeypatch):
    seconds = {"baseline": [1.0] * 5, "method": [1.6] * 5}
    monkeypatch.setattr("gdetkd.study.step_time.time_in_rounds", lambda works, rounds, warm_up: seconds)
    plain = distill_cfg({"DISTILL.LOSSES": ()})
    ratios = [measure_pair(plain, distill_cfg({"DISTILL.UNTIL": share})).ratio for share in (1.0, 0.5, 0.25)]
    assert ratios == [1.6, 1.3, 1.15]


def test_a_time_that_is_not_known_is_refused(distill_cfg, tmp_path):
    (tmp_path / "c.yaml").write_text(distill_cfg({"DISTILL.UNTIL": 0.5, "DATASETS.TEST": ("tiny",)}).dump())
    opts = ["TEST.PATIENCE", "2"]
    Comparison(str(tmp_path / "c.yaml"), opts, tmp_path, ["GDetKD"])
    Comparison(str(tmp_path / "c.yaml"), [], tmp_path, ["GDetKD"], equal_time=True)
    with pytest.raises(GDetKDError, match="Equal time is unknown .*DISTILL.UNTIL below 1"):
        Comparison(str(tmp_path / "c.yaml"), opts, tmp_path, ["GDetKD"], equal_time=True)


def test_nothing_is_logged_of_losses_that_are_no_longer_computed(distill_cfg):
    keys = {"DISTILL.TEACHER.CACHE_MB": 10, "SOLVER.MAX_ITER": 40, "SOLVER.BASE_LR": 1e-5, "TEST.EVAL_PERIOD": 0}
    for until, last in ((1.0, 39), (0.5, 19)):
        trainer = made(distill_cfg({**keys, "DISTILL.UNTIL": until}))
        train(trainer)
        latest = trainer.storage.latest()
        assert latest["teacher/kept"][1] == latest["sgfi/attention"][1] == last and latest["teacher/kept"][0] > 0


def test_the_check_says_it(distill_cfg):
    assert "After 50% of them the student trains alone (DISTILL.UNTIL)" in Check(distill_cfg(UNTIL)).run()
    assert "DISTILL.UNTIL" not in Check(distill_cfg()).run()
