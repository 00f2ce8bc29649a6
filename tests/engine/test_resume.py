"""A resumed run names what has changed since the checkpoint, and refuses changes that would corrupt it."""

import json
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from test_trainer import train

from conftest import write_coco
from gdetkd import DistillTrainer
from gdetkd.data import register_datasets
from gdetkd.engine.resume import RunRecord
from gdetkd.errors import GDetKDError


def test_changes_of_the_config_are_named(distill_cfg, caplog):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 2})
    train(DistillTrainer, cfg)
    assert "changed since the checkpoint" not in caplog.text
    train(DistillTrainer, cfg, resume=True)
    assert "changed since the checkpoint" not in caplog.text
    cfg.SOLVER.MAX_ITER, cfg.DISTILL.CKD.WEIGHT = 3, 0.25
    train(DistillTrainer, cfg, resume=True)
    assert (
        "changed since the checkpoint was written: DISTILL.CKD.WEIGHT 0.5 -> 0.25; SOLVER.MAX_ITER 2 -> 3."
        in caplog.text
    )


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_warning_names_changed_keys_that_the_optimizer_ignores(distill_cfg, caplog, optimizer):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 3, "SOLVER.WARMUP_ITERS": 0, "SOLVER.OPTIMIZER": optimizer})
    before, _ = train(DistillTrainer, cfg, stop_at=1)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.GAMMA = 1e-7, 0.5, 0.3, 0.2
    after, _ = train(DistillTrainer, cfg, resume=True)
    assert "SOLVER.BASE_LR 0.0005 -> 1e-07" in caplog.text and "SOLVER.GAMMA 0.1 -> 0.2" in caplog.text
    kept = "a resumed run keeps its optimizer: SOLVER.BASE_LR, SOLVER.MOMENTUM, SOLVER.WEIGHT_DECAY. To train"
    assert kept in caplog.text
    names = ("lr", "initial_lr", "weight_decay", "momentum", "betas")
    groups = [t.optimizer.param_groups for t in (before, after)]
    first, second = ([{name: group.get(name) for name in names} for group in run_groups] for run_groups in groups)
    assert first == second and after.scheduler.base_lrs == before.scheduler.base_lrs


def test_a_changed_number_of_processes_is_named(distill_cfg, caplog):
    record = RunRecord(distill_cfg(), ("cat", "dog"))
    record.load_state_dict({**record.state_dict(), "processes": 4})
    assert "changed since the checkpoint was written: number of processes 4 -> 1." in caplog.text


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("DISTILL.LOSSES", ("CKD", "SGFI"), "other distillation losses: DISTILL.LOSSES .*SGFI.*CKD"),
        ("DISTILL.WEIGHTS", "auto", "other weights of the losses: DISTILL.WEIGHTS 'fixed'; now 'auto'"),
        ("SOLVER.OPTIMIZER", "AdamW", "another optimizer"),
        ("SOLVER.AMP.ENABLED", True, "another precision: SOLVER.AMP.ENABLED False; now True"),
        ("SOLVER.BIAS_LR_FACTOR", 2.0, "other groups of parameters .*SOLVER.WEIGHT_DECAY"),
        ("DISTILL.CKD.PROJECTION_DIM", 4, "other distillation losses, or with losses of other sizes"),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "another student.*box_head"),
    ],
)
def test_a_change_that_would_corrupt_the_run_is_refused(distill_cfg, key, value, match):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 1, "DISTILL.LOSSES": ("SGFI", "CKD")})
    train(DistillTrainer, cfg)
    before = (Path(cfg.OUTPUT_DIR) / "model_final.pth").read_bytes()
    cfg.merge_from_list([key, value])
    with pytest.raises(GDetKDError, match=f"started with {match}"):
        train(DistillTrainer, cfg, resume=True)
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").read_bytes() == before


@pytest.mark.parametrize("names, match", [((2, 1, 0), "its classes in another order"), ((0, 1, 5), "other classes")])
def test_other_classes_are_refused(distill_cfg, tmp_path, names, match):
    write_coco(tmp_path, 4, name="mine")
    path = tmp_path / "mine.json"
    entry = {"name": "mine", "kind": "coco", "json": str(path), "images": str(tmp_path)}
    keys = {"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("mine",), "SOLVER.MAX_ITER": 1}
    cfg = distill_cfg({**keys, "DISTILL.LOSSES": ("SGFI",)})
    train(DistillTrainer, cfg)
    content = json.loads(path.read_text())
    content["categories"] = [{"id": i + 1, "name": f"class{name}"} for i, name in enumerate(names)]
    path.write_text(json.dumps(content))
    DatasetCatalog.remove("mine"), MetadataCatalog.remove("mine")  # read the file again, as a new process does
    register_datasets(cfg)
    with pytest.raises(GDetKDError, match=f"started with {match}: class0, class1, class2; now class{names[0]}"):
        train(DistillTrainer, cfg, resume=True)


@pytest.mark.parametrize("how", ["unread", "renamed", "moved"])
def test_changed_images_cause_a_warning(distill_cfg, tmp_path, caplog, how):
    """For example, an image could not be read at one of the starts. From there on the order of images differs."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_coco(folder, 4, name="mine")

    def register():
        entry = {"name": "mine", "kind": "coco", "json": str(folder / "mine.json"), "images": str(folder)}
        cfg.DATASETS.REGISTER = [entry]
        register_datasets(cfg)

    cfg = distill_cfg({"DATASETS.TRAIN": ("mine",), "SOLVER.MAX_ITER": 1, "INPUT.MAX_BAD_FRACTION": 0.5})
    register()
    train(DistillTrainer, cfg)
    if how == "unread":
        (folder / "mine2.png").write_bytes(b"")
    elif how == "renamed":
        (folder / "mine2.png").rename(folder / "other.png")
        (folder / "mine.json").write_text((folder / "mine.json").read_text().replace("mine2.png", "other.png"))
    else:
        folder = folder.rename(tmp_path / "moved")
    DatasetCatalog.remove("mine"), MetadataCatalog.remove("mine")
    register()
    cfg.SOLVER.MAX_ITER = 2
    train(DistillTrainer, cfg, resume=True)
    change = {"unread": "4 then, 3 now.", "renamed": "4 then, 4 now, with other names.", "moved": None}[how]
    assert (f"images changed since the run was started: {change}" in caplog.text) == (change is not None)
    assert ("images changed since" in caplog.text) == (change is not None)


def test_a_moved_teacher_is_recognised_by_its_hash(distill_cfg, tmp_path, caplog):
    cfg = distill_cfg({"SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2})
    _, uninterrupted = train(DistillTrainer, cfg)
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    shutil.move(cfg.DISTILL.TEACHER.WEIGHTS, tmp_path / "moved.pth")
    with pytest.raises(GDetKDError, match="are not there"):
        train(DistillTrainer, cfg, resume=True)
    cfg.DISTILL.TEACHER.WEIGHTS = str(tmp_path / "moved.pth")
    _, steps = train(DistillTrainer, cfg, resume=True)
    assert steps == {2: uninterrupted[2], 3: uninterrupted[3]} and "gives other targets" not in caplog.text
    assert "DISTILL.TEACHER.WEIGHTS" in caplog.text
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.PIXEL_STD", [2.0, 2.0, 2.0]]
    train(DistillTrainer, cfg, resume=True)
    assert "pixel_std [1.0, 1.0, 1.0] when the checkpoint was written" in caplog.text
    assert "pixel_std [2.0, 2.0, 2.0] now, so it gives other targets" in caplog.text
