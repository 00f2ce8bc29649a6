"""TEST.KEYPOINT_OKS_SIGMAS decides how far a detected keypoint may be from the true one."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.engine.evaluators import build_evaluator

KEYPOINTS = 2
OFFSET = 3.0  # distance of every detected keypoint from the true one, in pixels


@pytest.fixture
def keypoints_cfg(tmp_path):
    """Return a function that makes the config of a dataset whose objects have two keypoints each."""
    write_coco(tmp_path, 4, name="mine")
    content = json.loads((tmp_path / "mine.json").read_text())
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation.update(keypoints=[x, y, 2, x + width, y + height, 2], num_keypoints=KEYPOINTS)
    (tmp_path / "mine.json").write_text(json.dumps(content))
    entry = {"name": "mine", "kind": "coco", "json": str(tmp_path / "mine.json"), "images": str(tmp_path)}

    def make(**changes):
        cfg = make_cfg({"DATASETS.REGISTER": [entry], "OUTPUT_DIR": str(tmp_path), **changes})
        register_datasets(cfg)
        return cfg

    return make


def score(cfg):
    """Return the AP of keypoints that are all a little off."""
    evaluator = build_evaluator(cfg, "mine", ("keypoints",))
    evaluator.reset()
    for sample in DatasetCatalog.get("mine"):
        found = Instances((sample["height"], sample["width"]))
        objects = sample["annotations"]
        points = torch.tensor([item["keypoints"] for item in objects]).view(-1, KEYPOINTS, 3).float()
        points[:, :, 0] += OFFSET
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32)
        found.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        found.scores, found.pred_keypoints = torch.ones(len(objects)), points
        found.pred_classes = torch.tensor([item["category_id"] for item in objects])
        evaluator.process([sample], [{"instances": found}])
    return evaluator.evaluate()["keypoints"]["AP"]


@pytest.mark.parametrize("implementation", ["pycocotools", "faster-coco-eval"])
def test_sigmas_reach_the_metrics(keypoints_cfg, implementation):
    scores = []
    for sigma in (0.01, 1.0):
        keys = {"TEST.COCO_EVAL": implementation, "TEST.KEYPOINT_OKS_SIGMAS": [sigma] * KEYPOINTS}
        scores.append(score(keypoints_cfg(**keys)))
    assert scores[0] < 1 and scores[1] > 99
