"""Training: the baseline is Detectron2's, checkpoints are the plain student's, and a run resumes bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from conftest import ALL_LOSSES, WIDER, make_batch, make_cfg, plain_keys_of
from gdetkd import DistillTrainer
from gdetkd.config import plain_config
from gdetkd.data.train_loader import images_per_process
from gdetkd.engine import build_plain_student, evaluate_teacher, optimizer_step
from gdetkd.engine.hooks import RandomState
from gdetkd.errors import GDetKDError
from gdetkd.insight.run import read_curve, read_teacher_ap


class Losses(HookBase):
    """Keeps every scalar of each iteration."""

    def __init__(self):
        self.steps = {}

    def after_step(self):
        latest = self.trainer.storage.latest()
        self.steps[self.trainer.iter] = {k: v[0] for k, v in latest.items() if "loss" in k and "share" not in k}


def train(trainer_class, cfg, resume=False, stop_at=None):
    """Trains with a fixed seed; `stop_at` ends it as a kill after that many iterations would."""
    seed_all_rng(cfg.SEED)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    losses = Losses()
    trainer.register_hooks([losses])
    if stop_at is not None:
        trainer.max_iter = stop_at
    trainer.train()
    return trainer, losses.steps


def on_fixed_batches(trainer_class):
    class Trainer(trainer_class):
        @classmethod
        def build_train_loader(cls, cfg):
            return [make_batch(seed=seed) for seed in range(6)]

    return Trainer


def test_without_losses_a_run_is_bit_identical_to_detectron2s(distill_cfg):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "SOLVER.MAX_ITER": 5})
    plain = plain_keys_of(plain_config(cfg))
    _, theirs = train(on_fixed_batches(DefaultTrainer), plain)
    _, ours = train(on_fixed_batches(DistillTrainer), cfg)
    assert list(ours) == [0, 1, 2, 3, 4] and ours == theirs


def test_with_losses_the_students_own_first_losses_are_still_those(distill_cfg):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 1})
    _, theirs = train(on_fixed_batches(DefaultTrainer), plain_keys_of(plain_config(cfg)))
    _, ours = train(on_fixed_batches(DistillTrainer), cfg)
    assert all(ours[0][name] == value for name, value in theirs[0].items() if name != "total_loss")


def test_checkpoint_is_the_plain_students_and_plain_detectron2_reads_it(distill_cfg, tmp_path):
    cfg = distill_cfg({"SOLVER.CHECKPOINT_PERIOD": 2})
    trainer, _ = train(DistillTrainer, cfg)
    plain = build_model(plain_keys_of(plain_config(cfg)))
    for name in ("model_0000001.pth", "model_final.pth"):
        checkpoint = torch.load(tmp_path / "run" / name, weights_only=True)
        assert list(checkpoint["model"]) == list(plain.state_dict())
    DetectionCheckpointer(plain).load(str(tmp_path / "run" / "model_final.pth"))
    plain.eval(), trainer.model.eval()
    with torch.no_grad():
        for ours, theirs in zip(trainer.model(make_batch()), plain(make_batch())):
            assert len(ours["instances"]) > 0
            assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
            assert torch.equal(ours["instances"].scores, theirs["instances"].scores)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(distill_cfg, tmp_path, optimizer):
    """Across a shuffled order, random flips and resizes, queue and tau, an evaluation, and two workers."""
    keys = {
        "SOLVER.MAX_ITER": 8,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "SOLVER.OPTIMIZER": optimizer,
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "DATALOADER.NUM_WORKERS": 2,
        "DATASETS.TEST": ("tiny",),
        "TEST.EVAL_PERIOD": 3,
    }
    cfg = distill_cfg(keys)
    whole, uninterrupted = train(DistillTrainer, cfg)
    interrupted = {"OUTPUT_DIR": str(tmp_path / "interrupted")}
    (tmp_path / "interrupted").mkdir()
    cfg.merge_from_list([item for pair in interrupted.items() for item in pair])
    _, first = train(DistillTrainer, cfg, stop_at=3)
    resumed, second = train(DistillTrainer, cfg, resume=True)
    assert list(first) == [0, 1, 2] and list(second) == [3, 4, 5, 6, 7]
    assert {**first, **second} == uninterrupted
    ours, theirs = resumed.distiller.losses.state_dict(), whole.distiller.losses.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["CKD.queue.filled"] > 0 and ours["SGFI.log_tau"] != 0


@pytest.mark.parametrize("student", ["retinanet", "fcos"])
def test_a_resumed_run_of_a_dense_student_is_bit_identical_too(pair_cfg, tmp_path, student):
    """Detectron2 divides its losses by a moving average that is in no state dict."""
    cfg = pair_cfg(f"faster_rcnn-{student}", {"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2})
    _, uninterrupted = train(DistillTrainer, cfg)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    _, second = train(DistillTrainer, cfg, resume=True)
    assert second == {2: uninterrupted[2], 3: uninterrupted[3]}


def test_a_run_on_the_cpu_leaves_a_gpu_alone(distill_cfg, monkeypatch):
    """Asking for the state of a GPU's generator would create a context on it, of hundreds of MB, every process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA is initialised"))
    cfg = distill_cfg({"SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1, "DISTILL.SKIP_NONFINITE": 1})
    train(DistillTrainer, cfg)
    train(DistillTrainer, cfg, resume=True)


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


def test_resuming_without_the_loaders_position_would_be_noticed(distill_cfg):
    """The test above can fail: starting the data over gives other losses."""
    cfg = distill_cfg({"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2})
    _, uninterrupted = train(DistillTrainer, cfg, stop_at=4)

    class Forgetful(DistillTrainer):
        def resume_or_load(self, resume=True):
            super().resume_or_load(resume)
            self.data_loader.start_iter = 0

    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    _, second = train(Forgetful, cfg, resume=True)
    assert second[2] != uninterrupted[2]


def test_resume_refuses_another_teacher_and_other_losses(distill_cfg, make_teacher):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 1})
    train(DistillTrainer, cfg)
    make_teacher(seed=8)
    with pytest.raises(GDetKDError, match="another teacher"):
        train(DistillTrainer, cfg, resume=True)
    make_teacher(seed=7)
    cfg.DISTILL.LOSSES = ("SGFI",)
    with pytest.raises(GDetKDError, match="other distillation losses"):
        train(DistillTrainer, cfg, resume=True)


def test_resuming_with_another_number_of_processes_is_said(caplog):
    RandomState(period=1).load_state_dict({"states": [{}, {}]})
    assert "started with 2 processes and goes on with 1" in caplog.text


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


def test_best_checkpoint_and_teacher_score(distill_cfg, tmp_path):
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "DISTILL.EVAL_TEACHER": True, "SOLVER.MAX_ITER": 4}
    cfg = distill_cfg(keys)
    trainer, _ = train(DistillTrainer, cfg)
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    assert list(best["model"]) == list(trainer.student.state_dict())
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "teacher/bbox/AP" in metrics and '"bbox/AP"' in metrics


def test_the_best_score_so_far_survives_a_resume(distill_cfg, tmp_path, monkeypatch):
    """Else the first evaluation after it would overwrite a better checkpoint."""
    cfg = distill_cfg({"DISTILL.LOSSES": (), "DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 4})
    scores = iter([50.0, 40.0, 40.0])
    monkeypatch.setattr(DistillTrainer, "test", classmethod(lambda *args: {"bbox": {"AP": next(scores)}}))
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    train(DistillTrainer, cfg, stop_at=3)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")  # as a kill after iteration 3 leaves it
    best = (tmp_path / "run" / "model_best.pth").read_bytes()
    train(DistillTrainer, cfg, resume=True)
    assert (tmp_path / "run" / "model_best.pth").read_bytes() == best


def test_head_transfer_happens_before_training_but_not_on_resume(distill_cfg):
    cfg = distill_cfg({"DISTILL.LOSSES": (), "DISTILL.HEAD_TRANSFER": True, "SOLVER.MAX_ITER": 1})
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    teacher, student = trainer.distiller.teacher.model.state_dict(), trainer.student.state_dict()
    heads = [name for name in student if name.startswith(("roi_heads", "proposal_generator"))]
    assert heads and all(torch.equal(student[name], teacher[name]) for name in heads)
    assert not torch.equal(
        student["backbone.fpn_lateral2.weight"], torch.zeros_like(student["backbone.fpn_lateral2.weight"])
    )
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


def test_a_teacher_with_masks_is_evaluated_on_a_set_of_boxes(distill_cfg, tmp_path):
    cfg = distill_cfg({"DATASETS.TEST": ("tiny",)}, teacher={**WIDER, "MODEL.MASK_ON": True})
    assert set(evaluate_teacher(cfg)) == {"bbox"}


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
