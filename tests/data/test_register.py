"""Register datasets, and check them before training."""

import json
import os
import pickle
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import DENSE, make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.train_images import load_images
from gdetkd.engine import DistillTrainer
from gdetkd.engine.class_checks import check_classes
from gdetkd.engine.dataset_checks import check_datasets, check_test_sets
from gdetkd.errors import GDetKDError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def register(*entries):
    cfg = make_cfg({"DATASETS.REGISTER": list(entries)})
    register_datasets(cfg)
    return cfg


def coco(folder, name="mine", **changes):
    return {"name": name, "kind": "coco", "json": str(folder / "mine.json"), "images": str(folder), **changes}


def test_a_coco_dataset_with_and_without_a_limit(tmp_path):
    write_coco(tmp_path, 5, name="mine")
    register(coco(tmp_path), coco(tmp_path, name="three", limit=3))
    assert len(DatasetCatalog.get("mine")) == 5 and len(DatasetCatalog.get("three")) == 3
    assert MetadataCatalog.get("mine").thing_classes == ["class0", "class1", "class2"]
    register(coco(tmp_path))  # registering an entry again is no error
    with pytest.raises(GDetKDError, match="has the name 'mine' already"):
        register(coco(tmp_path, limit=2))


def test_relative_paths_start_at_detectron2s_data_folder(tmp_path, monkeypatch):
    write_coco(tmp_path, 2, name="mine")
    monkeypatch.setenv("HOME", str(tmp_path.parent.parent))
    monkeypatch.setenv("DETECTRON2_DATASETS", f"~/{tmp_path.parent.name}")
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
        ({"name": 2024, "kind": "coco", "json": "a", "images": "b"}, "name 2024 is no text"),
        ({"name": "x", "kind": "csv"}, "`kind` of coco, images, pseudo, voc, yolo"),
        ({"name": "x", "kind": "coco", "json": "a"}, "lacks the key images. Correct the entry"),
        ({"name": "x", "kind": "coco", "json": "a", "images": "b", "split": "c"}, "has the unknown key split"),
        ({"name": "x", "kind": "coco", "json": "nowhere.json", "images": "b"}, "nowhere.json.*DETECTRON2_DATASETS"),
        ({"name": "x", "kind": "coco", "json": "a", "images": "b", "limit": 0}, "limit"),
    ],
)
def test_invalid_entries_are_refused(entry, match):
    with pytest.raises(GDetKDError, match=match):
        register(entry)


def test_datasets_that_are_unknown_or_empty_are_refused(tmp_path):
    with pytest.raises(GDetKDError, match="'tinny' is not registered. Add it to DATASETS.REGISTER"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ("tinny",)}))
    with pytest.raises(GDetKDError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ()}))
    keys = {"MODEL.META_ARCHITECTURE": "GDetKD", "DISTILL.EVAL_TEACHER": True, "DATASETS.TEST": ()}
    with pytest.raises(GDetKDError, match="EVAL_TEACHER is True, but DATASETS.TEST is empty"):
        check_datasets(make_cfg(keys))
    write_coco(tmp_path, 0, name="mine")
    with pytest.raises(GDetKDError, match="'mine' has no image"):
        check_datasets(
            make_cfg({"DATASETS.TRAIN": ("mine",), "DATASETS.REGISTER": register(coco(tmp_path)).DATASETS.REGISTER})
        )


def test_a_missing_file_of_a_builtin_dataset_is_reported():
    with pytest.raises(GDetKDError, match="instances_val2017.json.*DETECTRON2_DATASETS"):
        check_datasets(make_cfg({"DATASETS.TRAIN": ("coco_2017_val",)}))


def test_a_wrong_number_of_classes_is_refused(tiny_dataset):
    check_datasets(make_cfg({}))
    check_classes(["tiny"], 3)
    with pytest.raises(GDetKDError, match="has 3 classes and the student 80.*NUM_CLASSES"):
        check_classes(["tiny"], 80)


@pytest.mark.parametrize("architecture, node", [("GeneralizedRCNN", "ROI_HEADS"), ("RetinaNet", "RETINANET")])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_wrong_number_of_classes_is_refused_before_anything_is_built(architecture, node, distilled, monkeypatch):
    monkeypatch.setattr(DistillTrainer, "build_model", None)
    keys = {**(DENSE if architecture == "RetinaNet" else {}), "MODEL.META_ARCHITECTURE": architecture}
    keys[f"MODEL.{node}.NUM_CLASSES"] = 80
    if distilled:
        keys.update({"MODEL.META_ARCHITECTURE": "GDetKD", "DISTILL.STUDENT_META_ARCHITECTURE": architecture})
    cfg = make_cfg({**keys, "DISTILL.LOSSES": ("CLS",) if distilled else ()})
    with pytest.raises(GDetKDError, match="has 3 classes and the student 80.*NUM_CLASSES"):
        DistillTrainer(cfg)


def datasets_with_classes(folder, *names):
    """Register a COCO dataset of two images for each list of class names. Return a config that trains on the first."""
    entries = []
    for index, classes in enumerate(names):
        (folder / str(index)).mkdir()
        write_coco(folder / str(index), 2, name="mine")
        path = folder / str(index) / "mine.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": c + 1, "name": name} for c, name in enumerate(classes)]
        path.write_text(json.dumps(content))
        entries.append(coco(folder / str(index), name=f"set{index}"))
    keys = {"DATASETS.TRAIN": ("set0",), "DATASETS.TEST": tuple(entry["name"] for entry in entries[1:])}
    cfg = make_cfg({**keys, "DATASETS.REGISTER": entries})
    register_datasets(cfg)
    return cfg


def test_classes_in_another_order_are_refused_also_in_another_case(tmp_path):
    cfg = datasets_with_classes(tmp_path, "xyz", ["x", "Z", "Y"])
    with pytest.raises(GDetKDError, match="'set0' and 'set1' have the same classes in different orders"):
        check_datasets(cfg)


def test_differing_class_names_cause_a_warning(tmp_path, caplog):
    check_datasets(datasets_with_classes(tmp_path, "xyz", "XYZ", ["x", "person", "z"]))
    assert caplog.text.count("name their classes differently") == 1
    assert "'y' is 'person' in the second" in caplog.text


def test_training_sets_may_spell_their_classes_differently(tmp_path):
    cfg = datasets_with_classes(tmp_path, "xyz", "XYZ", ["x", "person", "z"])
    for sampler in ("TrainingSampler", "WeightedTrainingSampler"):
        cfg.merge_from_list(["DATASETS.TRAIN", ("set0", "set1", "set2"), "DATALOADER.SAMPLER_TRAIN", sampler])
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("set0", 2.0)]
        check_datasets(cfg)
        assert len(load_images(cfg)[0]) == 6


@pytest.mark.parametrize("crowds", [True, False])
def test_a_test_set_without_an_object_is_refused_or_causes_a_warning(tmp_path, caplog, crowds):
    write_coco(tmp_path, 4, name="mine")
    content = json.loads((tmp_path / "mine.json").read_text())
    content["annotations"] = [{**item, "iscrowd": 1} for item in content["annotations"]] if crowds else []
    (tmp_path / "mine.json").write_text(json.dumps(content))
    cfg = make_cfg({"DATASETS.TEST": ("mine",), "DATASETS.REGISTER": [coco(tmp_path)]})
    register_datasets(cfg)
    if crowds:
        with pytest.raises(GDetKDError, match="'mine' cannot be evaluated on.*all of its 7 annotations.*crowds"):
            check_test_sets(cfg)
    else:
        check_test_sets(cfg)
        assert "mine has no annotation, so there is no AP" in caplog.text


def test_a_test_set_needs_cocos_metrics(tmp_path, caplog):
    write_coco(tmp_path, 2, name="mine")
    register(coco(tmp_path))
    images = DatasetCatalog.get("mine")
    for kind in ("lvis", "coco_panoptic_seg"):
        DatasetCatalog.register(f"mine_{kind}", lambda: images)
        MetadataCatalog.get(f"mine_{kind}").set(evaluator_type=kind, thing_classes=["class0", "class1", "class2"])
    with pytest.raises(GDetKDError, match="'mine_lvis' in DATASETS.TEST is an LVIS dataset"):
        check_test_sets(make_cfg({"DATASETS.TEST": ("mine_lvis",)}))
    check_test_sets(make_cfg({"DATASETS.TEST": ("mine_coco_panoptic_seg",)}))
    assert "mine_coco_panoptic_seg is evaluated by its boxes and masks alone" in caplog.text


def test_precomputed_proposals_need_a_file_for_each_dataset(tmp_path):
    write_coco(tmp_path, 2, name="mine")
    register(coco(tmp_path))
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps({"ids": [], "boxes": [], "objectness_logits": []}))
    files = (str(tmp_path / "proposals.pkl"),)
    keys = {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals", "DATASETS.TRAIN": ("mine",)}
    with pytest.raises(GDetKDError, match="NAME is 'PrecomputedProposals', but MODEL.LOAD_PROPOSALS is False"):
        check_datasets(make_cfg(keys))
    keys.update({"MODEL.LOAD_PROPOSALS": True, "DATASETS.TEST": ("mine",), "DATASETS.PROPOSAL_FILES_TEST": files})
    with pytest.raises(GDetKDError, match="TRAIN names 1 datasets, but DATASETS.PROPOSAL_FILES_TRAIN names 0 files"):
        check_datasets(make_cfg(keys))
    keys["DATASETS.PROPOSAL_FILES_TRAIN"] = files
    check_datasets(make_cfg(keys))
    check_datasets(make_cfg({**keys, "DATASETS.TEST": ()}))  # the file of the base config stays
    with pytest.raises(GDetKDError, match="TEST names 1 datasets, but DATASETS.PROPOSAL_FILES_TEST names 0 files"):
        check_datasets(make_cfg({**keys, "DATASETS.PROPOSAL_FILES_TEST": ()}))


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
