"""Training follows its config: losses, optimizers, weights and evaluations. A config without effect is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from test_trainer import train

from conftest import ALL_LOSSES, WIDER, make_cfg
from gdetkd import DistillTrainer
from gdetkd.data.headers import read_headers
from gdetkd.data.train_loader import images_per_process
from gdetkd.engine import build_plain_student, evaluate_teacher, optimizer_step
from gdetkd.engine.hooks import Stopwatch
from gdetkd.engine.teacher_evaluation import TeacherScore
from gdetkd.errors import GDetKDError
from gdetkd.insight.run import read_curve, read_teacher_ap
from gdetkd.safe_load import UnreadableFileError


def test_a_students_own_loss_may_have_the_shape_1(distill_cfg, monkeypatch):
    trainer = DistillTrainer(distill_cfg({"SOLVER.MAX_ITER": 2, "DISTILL.LOSSES": ("CKD",)}))
    forward = trainer.student.forward
    monkeypatch.setattr(trainer.student, "forward", lambda batch: {k: v.reshape(1) for k, v in forward(batch).items()})
    trainer.train()
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    share = latest["loss_distill_ckd"] / latest["total_loss"]
    assert latest["share/loss_distill_ckd"] == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_weight_decay_leaves_the_temperature_alone(distill_cfg, optimizer):
    """It would pull log(tau) to 0, which is tau to 1. All other parameters keep Detectron2's decay and rate."""
    cfg = distill_cfg({"SOLVER.OPTIMIZER": optimizer, "SOLVER.WEIGHT_DECAY": 0.1, "DISTILL.SGFI.TAU": 5.0})
    trainer = DistillTrainer(cfg)
    decay = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    plain = DistillTrainer.build_optimizer(cfg, trainer.distiller)
    expected = {p: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    log_tau = trainer.distiller.losses["SGFI"].log_tau
    assert expected[log_tau] == 0.1 and decay == {**expected, log_tau: 0.0}
    rates = {p: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates == {p: group["lr"] for group in plain.param_groups for p in group["params"]}
    for parameter in decay:
        parameter.grad = torch.zeros_like(parameter)
    before = log_tau.item()
    trainer.optimizer.step()
    assert log_tau.item() == before


def test_scalars_that_a_loss_learns_say_whether_they_decay(distill_cfg):
    """A scalar is a temperature, a scale or an offset, which decay pulls to a value that nobody chose."""
    for losses in (ALL_LOSSES, ("FITNET", "GTMASK", "FGFI", "ROIFI", "CWD", "FGD", "MGD")):
        for loss in DistillTrainer(distill_cfg({"DISTILL.LOSSES": losses})).distiller.losses.values():
            scalars = {name for name, parameter in loss.named_parameters() if parameter.dim() == 0}
            assert scalars == set(loss.without_decay)


def test_terms_are_weighted_warmed_up_and_logged(distill_cfg, tmp_path):
    keys = {
        "DISTILL.LOSSES": ("SGFI", "CKD"),
        "DISTILL.SGFI.WEIGHT": 2.0,
        "DISTILL.CKD.WEIGHT": 3.0,
        "DISTILL.CKD.WARMUP_ITERS": 4,
    }
    trainer, steps = train(DistillTrainer, distill_cfg(keys))
    for iteration, values in steps.items():
        weights = {"sgfi": 2.0, "ckd": 3.0 * min(1.0, (iteration + 1) / 4)}
        for name, weight in weights.items():
            assert values[f"loss_distill_{name}"] == pytest.approx(weight * values[f"raw/loss_distill_{name}"])
        own = [v for k, v in values.items() if k.startswith("loss_")]
        assert values["total_loss"] == pytest.approx(sum(own), rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    last = lines[-1]
    assert last["share/loss_distill_sgfi"] == pytest.approx(last["loss_distill_sgfi"] / last["total_loss"], rel=0.3)
    assert {"raw/loss_distill_ckd", "loss_distill_ckd", "share/loss_distill_ckd"} <= set(last)


def test_logging_waits_for_nothing_before_the_backward_pass(distill_cfg, monkeypatch):
    trainer = DistillTrainer(distill_cfg({"SOLVER.MAX_ITER": 1}))
    trainer.resume_or_load(resume=False)
    had_gradients = []

    def read(*groups):
        had_gradients.append(all(p.grad is not None for p in trainer.student.parameters() if p.requires_grad))
        return numbers_of(*groups)

    numbers_of = optimizer_step._read
    monkeypatch.setattr(optimizer_step, "_read", read)
    trainer.train()
    assert had_gradients and all(had_gradients)


def test_head_transfer_happens_before_training_but_not_on_resume(distill_cfg):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "DISTILL.HEAD_TRANSFER": True, "SOLVER.MAX_ITER": 1})
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    teacher, student = trainer.distiller.teacher.model.state_dict(), trainer.student.state_dict()
    heads = [name for name in student if name.startswith(("roi_heads", "proposal_generator"))]
    assert heads and all(torch.equal(student[name], teacher[name]) for name in heads)
    backbone = [name for name in student if name.startswith("backbone") and student[name].dim() > 1]
    same_shape = [name for name in backbone if student[name].shape == teacher[name].shape]
    assert same_shape and not any(torch.equal(student[name], teacher[name]) for name in same_shape)
    trainer.train()
    resumed = DistillTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert not all(torch.equal(resumed.student.state_dict()[name], teacher[name]) for name in heads)


def test_evaluation_needs_no_teacher(distill_cfg):
    cfg = distill_cfg({"DISTILL.TEACHER.WEIGHTS": "gone.pth", "DISTILL.TEACHER.CONFIG_FILE": "gone.yaml"})
    assert type(build_plain_student(cfg)).__name__ == "GeneralizedRCNN"


def test_gradient_clipping_reaches_both_optimizers(distill_cfg):
    for name in ("SGD", "AdamW"):
        cfg = distill_cfg({"SOLVER.OPTIMIZER": name, "SOLVER.CLIP_GRADIENTS.ENABLED": True})
        trainer = DistillTrainer(cfg)
        assert "WithGradientClip" in type(trainer.optimizer).__name__
        owned = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
        assert owned == len(list(trainer.distiller.parameters())) > len(list(trainer.student.parameters()))
    cfg = distill_cfg({"SOLVER.OPTIMIZER": "Adam"})
    with pytest.raises(GDetKDError, match="SOLVER.OPTIMIZER"):
        DistillTrainer(cfg)


@pytest.mark.parametrize("keys", [{}, {"DISTILL.LOSSES": (), "DISTILL.HEAD_TRANSFER": True}])
def test_distillation_that_would_have_no_effect_is_refused(distill_cfg, keys):
    cfg = distill_cfg({"MODEL.META_ARCHITECTURE": "GeneralizedRCNN", **keys})
    with pytest.raises(GDetKDError, match="DISTILL has no effect"):
        DistillTrainer(cfg)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(distill_cfg):
    cfg = distill_cfg({"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.IMS_PER_BATCH": 12})
    with pytest.raises(GDetKDError, match="IMS_PER_BATCH is 12.*REFERENCE_WORLD_SIZE 8.*multiple of 8"):
        DistillTrainer.auto_scale_workers(cfg, 4)
    with pytest.raises(GDetKDError, match="IMS_PER_BATCH 16 does not divide by 3 processes: set it to 15"):
        images_per_process(make_cfg({"SOLVER.IMS_PER_BATCH": 16}), 3)
    assert images_per_process(make_cfg({"SOLVER.IMS_PER_BATCH": 16}), 4) == 4


def test_of_several_test_sets_the_first_counts(distill_cfg, tmp_path):
    entry = dict(MetadataCatalog.get("tiny").gdetkd_entry)
    keys = {"DATASETS.REGISTER": [{**entry, "name": "second", "limit": 4}], "DATASETS.TEST": ("tiny", "second")}
    cfg = distill_cfg({**keys, "DISTILL.EVAL_TEACHER": True, "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 2})
    DistillTrainer(cfg).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    [scores] = [line for line in lines if "tiny/bbox/AP" in line and "second/bbox/AP" in line]
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    assert best["record"]["metric"] == scores["tiny/bbox/AP"]
    assert read_curve(cfg) == ([2], [scores["tiny/bbox/AP"]])
    assert read_teacher_ap(cfg) is not None


def test_a_teachers_score_in_numpys_numbers_is_kept_as_plain_numbers():
    score = TeacherScore()
    score.set({"bbox": {"AP": np.float64(12.5)}})
    assert type(score.state_dict()["metrics"]["teacher/bbox/AP"]) is float


def test_the_period_of_evaluations_stays_valid_for_another_number_of_processes(distill_cfg):
    cfg = distill_cfg({"TEST.EVAL_PERIOD": -1, "SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.IMS_PER_BATCH": 4})
    assert DistillTrainer.auto_scale_workers(cfg, 1).TEST.EVAL_PERIOD == -1
    cfg.TEST.EVAL_PERIOD = 1
    assert DistillTrainer.auto_scale_workers(cfg, 8).TEST.EVAL_PERIOD == 1


def test_an_error_of_a_hook_on_resume_keeps_its_message(distill_cfg, monkeypatch):
    cfg = distill_cfg({"DATASETS.TEST": ("tiny",), "SOLVER.MAX_ITER": 1, "DISTILL.LOSSES": ()})
    trainer = DistillTrainer(cfg)
    trainer.train()

    def fail(path):
        raise UnreadableFileError("model_best.pth cannot be read.")

    monkeypatch.setattr("gdetkd.engine.hooks.read_weights", fail)
    with pytest.raises(UnreadableFileError, match="^model_best.pth cannot be read"):
        DistillTrainer(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize("device, logged", [("cuda", 3.0), ("cpu", None)])
def test_the_memory_of_a_gpu_is_logged(monkeypatch, device, logged):
    for name, value in (("is_available", True), ("is_initialized", True), ("memory_allocated", device == "cuda")):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**20)
    stopwatch = Stopwatch()
    with EventStorage() as storage:
        stopwatch.trainer = SimpleNamespace(storage=storage)
        stopwatch.before_step()
        stopwatch.after_step()
    assert storage.latest().get("max_mem", (None, 0)) == (logged, 0)


def test_a_teacher_with_masks_is_evaluated_on_a_set_of_boxes(distill_cfg, tmp_path):
    cfg = distill_cfg({"DATASETS.TEST": ("tiny",)}, teacher={**WIDER, "MODEL.MASK_ON": True})
    assert set(evaluate_teacher(cfg)) == {"bbox"}


def test_test_images_are_checked_once_although_teacher_and_student_are_evaluated_on_them(distill_cfg, monkeypatch):
    decoded, scores = [], {"bbox": {"AP": 1.0}}

    def counted(dicts, whole=False):
        decoded.extend(sample["file_name"] for sample in dicts if whole)
        return read_headers(dicts, whole)

    monkeypatch.setattr("gdetkd.data.clean.read_headers", counted)
    monkeypatch.setattr("gdetkd.engine.teacher_evaluation.evaluate_on", lambda *args: scores)
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: scores))
    cfg = distill_cfg({"DATASETS.TEST": ("tiny",), "DISTILL.EVAL_TEACHER": True, "SOLVER.MAX_ITER": 1})
    trainer = DistillTrainer(cfg)
    trainer.train()
    assert trainer.storage.latest()["teacher/bbox/AP"] == (1.0, 0)
    assert len(decoded) == len(set(decoded)) == 12


def test_starting_weights_that_are_not_there(distill_cfg):
    trainer = DistillTrainer(distill_cfg({"MODEL.WEIGHTS": "weights/R-18.pth"}))
    with pytest.raises(GDetKDError, match="'weights/R-18.pth' are not there.*convert_torchvision.py"):
        trainer.resume_or_load(resume=False)


def test_other_numbers_of_processes_scale_the_warm_up_of_the_terms(distill_cfg):
    changes = {"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.IMS_PER_BATCH": 16, "DISTILL.WARMUP_ITERS": 100}
    cfg = distill_cfg({**changes, "DISTILL.CKD.WARMUP_ITERS": 50, "SOLVER.MAX_ITER": 1000})
    scaled = DistillTrainer.auto_scale_workers(cfg, 2)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.MAX_ITER) == (4, 4000)
    assert (scaled.DISTILL.WARMUP_ITERS, scaled.DISTILL.CKD.WARMUP_ITERS) == (400, 200)
    assert (cfg.DISTILL.WARMUP_ITERS, scaled.DISTILL.SGFI.WARMUP_ITERS) == (100, 0)
    assert DistillTrainer.auto_scale_workers(scaled, 2) is scaled
