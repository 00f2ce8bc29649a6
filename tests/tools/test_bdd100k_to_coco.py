"""Test tools/bdd100k_to_coco.py on hand-made labels of 2020 and of 2018."""

import json
import subprocess
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import make_cfg
from gdetkd.data import register_datasets

TOOL = Path(__file__).parents[2] / "tools" / "bdd100k_to_coco.py"
FRAMES_2020 = [
    {
        "name": "a.jpg",
        "attributes": {"weather": "rainy"},
        "labels": [
            {"id": "1", "category": "car", "box2d": {"x1": 10.5, "y1": 20.0, "x2": 110.5, "y2": 70.0}},
            {"id": "2", "category": "pedestrian", "box2d": {"x1": -4.0, "y1": 700.0, "x2": 6.0, "y2": 730.0}},
            {"id": "3", "category": "other vehicle", "box2d": {"x1": 1, "y1": 1, "x2": 9, "y2": 9}},
            {"id": "4", "category": "bicycle", "box2d": {"x1": 5, "y1": 5, "x2": 5, "y2": 9}},
        ],
    },
    {"name": "b.jpg", "labels": None},
    {"name": "c.jpg"},
]
FRAMES_2018 = [
    {
        "name": "a.jpg",
        "labels": [
            {"category": "person", "box2d": {"x1": 0, "y1": 0, "x2": 10, "y2": 20}, "id": 0},
            {"category": "motor", "box2d": {"x1": 0, "y1": 0, "x2": 10, "y2": 20}, "id": 1},
            {"category": "bike", "box2d": {"x1": 0, "y1": 0, "x2": 10, "y2": 20}, "id": 2},
            {"category": "drivable area", "poly2d": [{"vertices": [[0, 0], [1, 1]]}], "id": 3},
        ],
    }
]


def run(frames, tmp_path):
    (tmp_path / "labels.json").write_text(frames if isinstance(frames, str) else json.dumps(frames))
    command = [sys.executable, TOOL, tmp_path / "labels.json", tmp_path / "out" / "coco.json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_labels_of_2020(tmp_path):
    result = run(FRAMES_2020, tmp_path)
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert all((image["width"], image["height"]) == (1280, 720) for image in coco["images"])
    car, pedestrian = coco["annotations"]
    assert (car["category_id"], car["bbox"], car["area"]) == (3, [10.5, 20.0, 100.0, 50.0], 5000.0)
    assert (pedestrian["category_id"], pedestrian["bbox"]) == (1, [0, 700.0, 6.0, 20.0])
    assert "3 images, 2 boxes" in result.stdout
    assert "1 'other vehicle'" in result.stdout and "1 whose box has no area" in result.stdout


def test_labels_of_2018_under_their_new_names(tmp_path):
    result = run(FRAMES_2018, tmp_path)
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert [names[a["category_id"]] for a in coco["annotations"]] == ["pedestrian", "motorcycle", "bicycle"]
    assert "1 without a box" in result.stdout


def test_detectron2_reads_the_result(tmp_path):
    run(FRAMES_2020, tmp_path)
    entry = {"name": "bdd", "kind": "coco", "json": str(tmp_path / "out/coco.json"), "images": str(tmp_path)}
    register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))
    dicts = DatasetCatalog.get("bdd")
    assert [len(image["annotations"]) for image in dicts] == [2, 0, 0]
    assert MetadataCatalog.get("bdd").thing_classes[dicts[0]["annotations"][0]["category_id"]] == "car"


def test_other_files_are_refused(tmp_path):
    for content, word in (
        ("[{", "not complete JSON"),
        ({"images": []}, "is not a BDD100K file"),
        ([], "is not a BDD100K file"),
    ):
        result = run(content, tmp_path)
        assert result.returncode == 1 and word in result.stderr
    missing = subprocess.run([sys.executable, TOOL, tmp_path / "none.json", "x"], capture_output=True, text=True)
    assert missing.returncode == 1 and "does not exist" in missing.stderr
