import json
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.engine.preflight import check_classes, check_datasets
from gdetkd.errors import GDetKDError

pytestmark = pytest.mark.usefixtures("forget_datasets")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def register(*entries):
    cfg = make_cfg({"DATASETS.REGISTER": list(entries)})
    register_datasets(cfg)
    return cfg


def coco(folder, name="mine", **changes):
    return {"name": name, "kind": "coco", "json": str(folder / "mine.json"), "images": str(folder), **changes}


def test_coco_and_limit(tmp_path):
    write_coco(tmp_path, 5, name="mine")
    register(coco(tmp_path), coco(tmp_path, name="three", limit=3))
    assert len(DatasetCatalog.get("mine")) == 5 and len(DatasetCatalog.get("three")) == 3
    assert MetadataCatalog.get("mine").thing_classes == ["class0", "class1", "class2"]
    register(coco(tmp_path))  # once more is no error
    with pytest.raises(GDetKDError, match="has that name already"):
        register(coco(tmp_path, limit=2))


def test_relative_paths_are_seen_from_detectron2s_folder(tmp_path, monkeypatch):
    write_coco(tmp_path, 2, name="mine")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path.parent))
    entry = {"name": "mine", "kind": "coco", "json": f"{tmp_path.name}/mine.json", "images": tmp_path.name}
    register(entry)
    assert os.path.exists(DatasetCatalog.get("mine")[0]["file_name"])


def test_boxes_without_area_are_left_out_with_one_warning(tmp_path, caplog):
    write_coco(tmp_path, 4, name="mine")
    content = json.loads((tmp_path / "mine.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][2]["bbox"][3] = 0
    (tmp_path / "mine.json").write_text(json.dumps(content))
    register(coco(tmp_path))
    for _ in range(2):
        count = sum(len(image["annotations"]) for image in DatasetCatalog.get("mine"))
        assert count == len(content["annotations"]) - 2
    assert caplog.text.count("2 annotations without area are left out") == 1


@pytest.mark.parametrize(
    "entry, match",
    [
        ({"kind": "coco"}, "needs a `name`"),
        ({"name": "x", "kind": "yolo"}, "`kind` of coco, voc, images"),
        ({"name": "x", "kind": "coco", "json": "a"}, "lacks images"),
        ({"name": "x", "kind": "coco", "json": "a", "images": "b", "split": "c"}, "has split"),
        ({"name": "x", "kind": "coco", "json": "nowhere.json", "images": "b"}, "nowhere.json.*DETECTRON2_DATASETS"),
        ({"name": "x", "kind": "coco", "json": "a", "images": "b", "limit": 0}, "limit"),
    ],
)
def test_entries_that_are_refused(entry, match):
    with pytest.raises(GDetKDError, match=match):
        register(entry)


def test_sets_that_are_not_registered_or_empty(tmp_path):
    with pytest.raises(GDetKDError, match="'tinny' is not registered: add it to DATASETS.REGISTER"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ("tinny",)}))
    with pytest.raises(GDetKDError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ()}))
    write_coco(tmp_path, 0, name="mine")
    with pytest.raises(GDetKDError, match="'mine' holds no image"):
        check_datasets(
            make_cfg({"DATASETS.TRAIN": ("mine",), "DATASETS.REGISTER": register(coco(tmp_path)).DATASETS.REGISTER})
        )


def test_file_of_a_builtin_set_is_missing():
    with pytest.raises(GDetKDError, match="instances_val2017.json.*DETECTRON2_DATASETS"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ("coco_2017_val",)}))


def test_number_of_classes_is_compared(tiny_dataset):
    check_datasets(make_cfg({}))
    check_classes(["tiny"], 3)
    with pytest.raises(GDetKDError, match="has 3 classes and the student 80.*NUM_CLASSES"):
        check_classes(["tiny"], 80)


@pytest.mark.skipif(not (SHARED / "BCCD").exists(), reason="the BCCD photographs are not beside this checkout")
def test_bccd_drops_its_two_annotations_without_area(monkeypatch, caplog):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(SHARED))
    register(
        {"name": "bccd", "kind": "voc", "root": "BCCD", "split": "trainval", "classes": ["RBC", "WBC", "Platelets"]}
    )
    images = DatasetCatalog.get("bccd")
    assert len(images) == 292
    assert "2 annotations without area are left out" in caplog.text
    assert (
        min(min(a["bbox"][2] - a["bbox"][0], a["bbox"][3] - a["bbox"][1]) for i in images for a in i["annotations"]) > 1
    )
