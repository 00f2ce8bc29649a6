"""The example in docs/dataset-kinds.md runs as written: the dataset is read, checked, trained on and evaluated."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import make_cfg, run_example, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.class_names import class_names
from gdetkd.engine import DistillTrainer
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.errors import GDetKDError

LINES = """file,width,height,x1,y1,x2,y2,class
mine0.png,80,64,1,2,21,22,cat
mine0.png,80,64,30,30,50,40,dog
mine1.png,64,64,5,5,5,25,cat
"""


@pytest.fixture
def own_kind():
    run_example("dataset-kinds.md")


@pytest.fixture
def cfg_of(own_kind, tmp_path):
    write_coco(tmp_path, 2, name="mine")
    (tmp_path / "mine.csv").write_text(LINES)

    def make(**changes):
        entry = {"name": "mine", "kind": "csv", "csv": str(tmp_path / "mine.csv"), "images": str(tmp_path)}
        entry.update({"classes": ["cat", "dog"], **changes})
        return make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("mine",), "DATASETS.TEST": ("mine",)})

    return make


def test_the_example_is_read_and_checked(cfg_of, caplog):
    cfg = cfg_of()
    register_datasets(cfg)
    check_datasets(cfg)
    first, second = DatasetCatalog.get("mine")
    assert [item["category_id"] for item in first["annotations"]] == [0, 1] and second["annotations"] == []
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]
    assert "mine: 1 annotations without area are left out" in caplog.text


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"json": "a"}, "'mine' \\(kind csv\\) has the unknown key json"),
        ({"csv": "nowhere.csv"}, "nowhere.csv.*does not exist"),
        ({"classes": ["dog"]}, "mine.csv', line 2: the class 'cat' is not in `classes`"),
    ],
)
def test_mistakes_of_an_entry_are_named(cfg_of, changes, match):
    cfg = cfg_of(**changes)
    with pytest.raises(GDetKDError, match=match):
        register_datasets(cfg)
        check_datasets(cfg)


@pytest.mark.parametrize("name", ["../mine0.png", "/etc/passwd"])
def test_file_names_that_leave_the_folder_are_refused(cfg_of, tmp_path, name):
    (tmp_path / "mine.csv").write_text(LINES.replace("mine0.png", name))
    cfg = cfg_of()
    register_datasets(cfg)
    with pytest.raises(GDetKDError, match=f"'mine' names the file '{name}', which leads out of"):
        DatasetCatalog.get("mine")
    DatasetCatalog.remove("mine")
    cfg.DATASETS.ALLOW_OUTSIDE = True
    register_datasets(cfg)
    assert DatasetCatalog.get("mine")[0]["file_name"].endswith(name)


def test_class_names_are_known_without_reading_the_file(cfg_of, tmp_path):
    cfg = cfg_of()
    (tmp_path / "mine.csv").unlink()
    assert class_names(cfg) == ("cat", "dog")


def test_a_run_trains_and_evaluates_on_the_example(cfg_of, tmp_path):
    cfg = cfg_of(limit=1)
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 1])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 2])
    register_datasets(cfg)
    assert len(DatasetCatalog.get("mine")) == 1
    DistillTrainer(cfg).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in lines) and any("total_loss" in line for line in lines)
