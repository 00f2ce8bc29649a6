"""Test what DISTILL.INSIGHT.PERIOD writes, and that it does not change the training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from matplotlib import pyplot as plt

from gdetkd import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.figures.style import STYLE, as_svg
from gdetkd.insight import charts
from gdetkd.insight.records import RecordFile

SEEN = {"DATASETS.TEST": ("tiny",), "TEST.KEEP_BEST": False, "DISTILL.INSIGHT.PERIOD": 2, "DISTILL.INSIGHT.IMAGES": 3}


def train(cfg, resume=False, stop_at=None):
    seed_all_rng(cfg.SEED)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if stop_at is not None:
        trainer.max_iter = stop_at
    trainer.train()
    return trainer


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k and "gradient" not in k} for line in lines]


def test_the_training_is_bit_identical_and_all_files_are_written(distill_cfg, tmp_path):
    weights = []
    for name, changes in (("plain", {**SEEN, "DISTILL.INSIGHT.PERIOD": 0}), ("seen", SEEN)):
        cfg = distill_cfg({**changes, "OUTPUT_DIR": str(tmp_path / name)})
        (tmp_path / name).mkdir()
        weights.append(train(cfg).student.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "seen")
    assert not (tmp_path / "plain" / "insight").exists()

    folder = tmp_path / "seen" / "insight"
    page = (folder / "index.html").read_text()
    for heading in ("Who finds what", "Which levels match", "How alike classes look", "What pulls at the student"):
        assert heading in page
    assert "mathdefault" not in page  # the numbers of a logarithmic axis
    assert {path.suffix for path in folder.iterdir()} == {".html", ".svg", ".png", ".jsonl"}
    records = RecordFile(str(tmp_path / "seen")).read()
    assert [record["iterations"] for record in records] == [0, 2, 4]
    assert records[0]["gradients"] is None
    assert set(records[1]["gradients"]) == {
        "student",
        *(f"loss_distill_{name}" for name in ("sgfi", "ckd", "cls", "reg")),
    }
    assert all(gradient["norm"] > 0 for gradient in records[1]["gradients"].values())
    alphas = [row for row in records[2]["levels"]["all"]["alpha"] if row is not None]
    assert alphas and all(abs(sum(row) - 1) < 1e-5 for row in alphas)
    events = b"".join(path.read_bytes() for path in (tmp_path / "seen").glob("events.out.tfevents*"))
    for name in (b"insight/tau", b"insight/detections", b"gradient/loss_distill_sgfi"):
        assert name in events


def test_a_record_holds_the_classes_that_have_objects(distill_cfg, tiny_dataset, tmp_path):
    """A set such as LVIS has 1,203 classes, and a matrix of all of them at every look would fill the memory."""
    content = json.loads((tiny_dataset / "tiny.json").read_text())
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] != 2]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    entry = {"name": "fewer", "kind": "coco", "json": str(tmp_path / "fewer.json"), "images": str(tiny_dataset)}
    cfg = distill_cfg({**SEEN, "DATASETS.TEST": ("fewer",), "DATASETS.REGISTER": [entry]})
    train(cfg)
    record = RecordFile(cfg.OUTPUT_DIR).read()[-1]
    assert record["classes"] == ["class0", "class2"]
    assert all(np.shape(matrix) == (2, 2) for matrix in record["correlation"].values())
    assert (Path(cfg.OUTPUT_DIR) / "insight" / "index.html").exists()


def test_a_resumed_run_records_each_iteration_once(distill_cfg):
    cfg = distill_cfg({**SEEN, "SOLVER.MAX_ITER": 6, "SOLVER.CHECKPOINT_PERIOD": 2})
    train(cfg, stop_at=5)
    file = RecordFile(cfg.OUTPUT_DIR)
    before = file.read()
    assert [record["iterations"] for record in before] == [0, 2, 4, 5]
    lines = (file.folder / "records.jsonl").read_text().splitlines()
    # The run was killed after the checkpoint of iteration 2 and before that record.
    (file.folder / "records.jsonl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    (file.folder.parent / "last_checkpoint").write_text("model_0000001.pth")
    train(cfg, resume=True)
    after = file.read()
    assert [record["iterations"] for record in after] == [0, 2, 4, 6]
    assert after[1] == {**before[1], "gradients": None} and after[2] == before[2]
    train(cfg, stop_at=1)  # starts again
    assert [record["iterations"] for record in file.read()] == [0, 1]


def test_no_picture_ends_a_training(distill_cfg, monkeypatch, caplog):
    cfg = distill_cfg({**SEEN, "SOLVER.MAX_ITER": 2})
    monkeypatch.setattr("gdetkd.insight.page.charts.draw_terms", lambda terms: [][0])
    train(cfg)
    assert "page of the distillation could not be written" in caplog.text and "IndexError" in caplog.text
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").exists()


def test_any_class_name_and_fewer_images_can_be_drawn(distill_cfg):
    cfg = distill_cfg({**SEEN, "SOLVER.MAX_ITER": 2})
    train(cfg)
    records = RecordFile(cfg.OUTPUT_DIR).read()
    names = ["a$%b$", "$5_a_b$", "$1_$2"]
    with plt.rc_context(STYLE):
        svg = as_svg(charts.draw_correlation(records[-1]["correlation"], names))
        assert all(name in svg for name in names)
        level = next(i for i, count in enumerate(records[-1]["levels"]["all"]["objects"]) if count)
        records[0]["levels"]["all"]["alpha"][level] = None  # as from fewer images, without an object on the level
        as_svg(charts.draw_level_history(records))


@pytest.mark.parametrize("pair", ["faster_rcnn-retinanet", "fcos-faster_rcnn"])
def test_across_families(pair_cfg, pair):
    cfg = pair_cfg(pair, {**SEEN, "SOLVER.MAX_ITER": 2})
    train(cfg)
    record = RecordFile(cfg.OUTPUT_DIR).read()[-1]
    assert record["iterations"] == 2 and record["correlation_gap"] is not None
    assert len(record["levels"]["all"]["alpha"]) == len(record["teacher_levels"])


def test_a_teacher_without_the_students_classes_is_not_shown(distill_cfg, caplog):
    keys = {"DISTILL.LOSSES": ("SGFI", "CKD"), "DISTILL.TEACHER.CLASSES": ["x", "y", "z"], "SOLVER.MAX_ITER": 2}
    cfg = distill_cfg({**SEEN, **keys})
    train(cfg)
    page = Path(cfg.OUTPUT_DIR, "insight", "index.html").read_text()
    assert "detections are not shown; the log says why." in page and "the teacher finds" not in page
    assert "teacher's mistakes" not in page


def test_without_sgfi_there_are_no_levels(distill_cfg):
    cfg = distill_cfg({**SEEN, "DISTILL.LOSSES": ("CKD",), "SOLVER.MAX_ITER": 2})
    train(cfg)
    record = RecordFile(cfg.OUTPUT_DIR).read()[-1]
    assert "levels" not in record and "tau" not in record and record["correlation_gap"] is not None


def test_without_losses_nothing_is_recorded(distill_cfg):
    cfg = distill_cfg({**SEEN, "DISTILL.LOSSES": (), "SOLVER.MAX_ITER": 2})
    train(cfg)
    assert RecordFile(cfg.OUTPUT_DIR).read() == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DATASETS.TEST": ()}, "DATASETS.TEST, which is empty"),
        ({"DISTILL.INSIGHT.BASELINE": "nowhere"}, "no config.yaml"),
    ],
)
def test_missing_images_or_baseline_are_reported_before_training(distill_cfg, changes, message):
    with pytest.raises(GDetKDError, match=message):
        DistillTrainer(distill_cfg({**SEEN, **changes}))
