"""A run trains on datasets in VOC's and YOLO's layouts, checks them, and evaluates student and teacher on them."""

import json

import pytest
from test_exact_detections_voc import CLASSES, write_voc
from test_exact_detections_yolo import corners, each_line, write_yolo

from conftest import WIDER
from gdetkd.data import register_datasets
from gdetkd.engine import DistillTrainer
from gdetkd.engine.check import Check
from gdetkd.errors import GDetKDError

MASKS = {"MODEL.MASK_ON": True}


def write_dataset(kind, folder):
    """Write a dataset of a kind, and return its entry of DATASETS.REGISTER."""
    if kind == "voc":
        write_voc(folder)
        return {"name": "mine", "kind": "voc", "root": str(folder), "split": "train", "classes": CLASSES}
    write_yolo(folder)
    if kind == "polygons":
        each_line(lambda columns: [columns[0], *corners(columns)])(folder)
    return {"name": "mine", "kind": "yolo", "yaml": str(folder / "data.yaml"), "split": "train"}


@pytest.mark.parametrize("kind", ["voc", "yolo", "polygons"])
def test_a_training_with_evaluations_and_the_check(distill_cfg, tmp_path, kind):
    keys = {"DATASETS.REGISTER": [write_dataset(kind, tmp_path / "data")], "DATASETS.TRAIN": ("mine",)}
    keys.update({"DATASETS.TEST": ("mine",), "DISTILL.EVAL_TEACHER": True, "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 2})
    keys["SOLVER.WARMUP_ITERS"] = 1
    masks = MASKS if kind == "polygons" else {}
    cfg = distill_cfg({**keys, **masks, "DISTILL.TEACHER.MIN_AP": 0.0}, {**WIDER, **masks})
    register_datasets(cfg)
    check = Check(cfg, images=3)
    screen = check.run()
    assert check.problems == [] and "Teacher on 3 images of mine" in screen
    DistillTrainer(cfg).train()
    with open(tmp_path / "run/metrics.json") as file:
        metrics = [json.loads(line) for line in file]
    scores = {key for line in metrics for key in line}
    assert {"bbox/AP", "teacher/bbox/AP"} <= scores and ("segm/AP" in scores) == bool(masks)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_a_broken_image_stops_a_training_if_too_many_are_bad(distill_cfg, tmp_path, kind):
    keys = {
        "DATASETS.REGISTER": [write_dataset(kind, tmp_path / "data")],
        "DATASETS.TRAIN": ("mine",),
        "SOLVER.MAX_ITER": 1,
    }
    broken = next(path for path in (tmp_path / "data").rglob("exact1.png"))
    broken.write_bytes(b"no image")
    with pytest.raises(GDetKDError, match="1 of 6 images cannot be used .exact1.png does not open"):
        DistillTrainer(distill_cfg(keys))
    DistillTrainer(distill_cfg({**keys, "INPUT.MAX_BAD_FRACTION": 0.2})).train()
