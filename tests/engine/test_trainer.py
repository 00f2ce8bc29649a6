"""Training: the baseline is Detectron2's, checkpoints are the plain student's, and a run resumes bit by bit."""

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from conftest import RESNET_C4, make_batch, plain_keys_of
from gdetkd import DistillTrainer
from gdetkd.config import plain_config
from gdetkd.engine.hooks import RandomState
from gdetkd.errors import GDetKDError
from gdetkd.metrics_file import MetricsFile


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
    _, plain_losses = train(on_fixed_batches(DefaultTrainer), plain)
    _, distill_losses = train(on_fixed_batches(DistillTrainer), cfg)
    assert list(distill_losses) == [0, 1, 2, 3, 4] and distill_losses == plain_losses


def test_a_student_without_an_fpn_trains_alone(distill_cfg):
    keys = {**RESNET_C4, "DISTILL.HEAD_TRANSFER": False}
    trainer, losses = train(DistillTrainer, distill_cfg({**keys, "DISTILL.LOSSES": (), "SOLVER.MAX_ITER": 1}))
    assert trainer.student_spec is None and losses[0]["total_loss"] > 0
    for method in ({"DISTILL.LOSSES": ("CKD",)}, {"DISTILL.LOSSES": (), "DISTILL.HEAD_TRANSFER": True}):
        with pytest.raises(GDetKDError, match="student has no FPN"):
            DistillTrainer(distill_cfg({**keys, **method}))


def test_with_losses_the_students_own_first_losses_are_still_those(distill_cfg):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 1})
    _, plain_losses = train(on_fixed_batches(DefaultTrainer), plain_keys_of(plain_config(cfg)))
    _, distill_losses = train(on_fixed_batches(DistillTrainer), cfg)
    assert all(distill_losses[0][name] == value for name, value in plain_losses[0].items() if name != "total_loss")


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
        for found, expected in zip(trainer.model(make_batch()), plain(make_batch())):
            assert len(found["instances"]) > 0
            assert torch.equal(found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
            assert torch.equal(found["instances"].scores, expected["instances"].scores)


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
    resumed_state, whole_state = resumed.distiller.losses.state_dict(), whole.distiller.losses.state_dict()
    assert all(torch.equal(resumed_state[name], whole_state[name]) for name in whole_state)
    assert resumed_state["CKD.queue.filled"] > 0 and resumed_state["SGFI.log_tau"] != 0


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
    RandomState(period=1).load_state_dict({"states": [{"normalizers": {}}, {"normalizers": {}}]})
    assert "started with 2 processes and goes on with 1" in caplog.text


def test_best_checkpoint_and_teacher_score(distill_cfg, tmp_path):
    """Detectron2 writes metrics every 20 iterations."""
    keys = {"DATASETS.TEST": ("tiny",), "TEST.EVAL_PERIOD": 20, "DISTILL.EVAL_TEACHER": True, "SOLVER.MAX_ITER": 40}
    cfg = distill_cfg({**keys, "SOLVER.BASE_LR": 1e-5, "SOLVER.CHECKPOINT_PERIOD": 10})
    trainer, _ = train(DistillTrainer, cfg)
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    assert list(best["model"]) == list(trainer.student.state_dict())
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_final.pth"
    lines = MetricsFile(tmp_path / "run").lines()
    assert [line["iteration"] for line in lines if "teacher/bbox/AP" in line] == [19, 39]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [19, 40]
    resumed, _ = train(DistillTrainer, cfg, resume=True)
    for latest in (trainer.storage.latest(), resumed.storage.latest()):
        assert "teacher/bbox/AP" in latest


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
