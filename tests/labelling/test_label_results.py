"""Test the labels that are made from the results of another program, and results that are refused."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image
from pycocotools.coco import COCO
from scenes import Scene, results_of

from conftest import make_cfg
from gdetkd.data import register_datasets
from gdetkd.errors import GDetKDError
from gdetkd.labelling.run import _entry, label_images
from gdetkd.labelling.source import own_part


@pytest.fixture
def cfg_of():
    return lambda scene, changes={}: make_cfg({**scene.keys, **changes})


def test_perfect_results_become_labels(tmp_path, cfg_of, capsys):
    scene = Scene(tmp_path)
    label_images(cfg_of(scene), scene.perfect())
    written = scene.read()
    described = written["info"]["gdetkd_labels"]
    assert (
        described["version"] == 1
        and described["source"] == "results"
        and set(described["teacher"])
        == {
            "file",
            "sha256",
        }
    )
    assert described["chosen_on"] == "val" and described["unreadable"] == described["left_out"] == 0
    counts = [item["category_id"] for item in scene.content["annotations"]]
    for index, name in enumerate(described["classes"], 1):
        expected = {"min_score": 0.9, "precision": 1.0, "recall": 1.0, "f1": 1.0, "boxes": counts.count(index)}
        assert described["thresholds"][name] == expected
    assert written["categories"] == [{"id": index, "name": f"class{index - 1}"} for index in (1, 2, 3)]

    names = {image["id"]: image["file_name"] for image in written["images"]}
    assert list(names) == list(range(1, 9)) and list(names.values()) == sorted(names.values())
    assert "sub/new3.png" in names.values()
    boxes = sorted((names[a["image_id"]], a["category_id"], a["bbox"]) for a in written["annotations"])
    original = {image["id"]: image["file_name"] for image in scene.content["images"]}
    assert boxes == sorted((original[a["image_id"]], a["category_id"], a["bbox"]) for a in scene.content["annotations"])
    assert all(a["score"] == 0.9 and a["iscrowd"] == 0 and "segmentation" not in a for a in written["annotations"])
    assert len(COCO(str(scene.output)).getAnnIds()) == len(boxes)

    page = scene.output.with_suffix(".html").read_text()
    assert "8 of 8 images" in page and "data:image/png;base64" in page and "class1" in page
    assert not scene.part.exists()
    assert "class0  0.900      1.000      1.000   1.000" in capsys.readouterr().out


def test_classes_are_matched_by_name_and_by_the_class_map(tmp_path, cfg_of, caplog):
    scene = Scene(tmp_path)
    names = {1: "class2", 2: "stranger", 3: "renamed"}
    scene.content["categories"] = [{"id": 10 * index, "name": name} for index, name in names.items()]
    for item in scene.content["annotations"]:
        item["category_id"] *= 10
    scene.write("new.json", scene.content)
    options = scene.perfect(min_score=0.5, validation_results="")
    with caplog.at_level(logging.WARNING, "gdetkd"):
        label_images(cfg_of(scene, {"DISTILL.CLASS_MAP": [["class0", "renamed"], ["class1", "other"]]}), options)
    written, given = scene.read(), [item["category_id"] for item in scene.content["annotations"]]
    labels = [item["category_id"] for item in written["annotations"]]
    assert labels.count(3) == given.count(10) and labels.count(1) == given.count(30) and 2 not in labels
    assert f"{given.count(20)} boxes of classes that the student lacks" in written["info"]["description"]
    assert "lacks 1 of the student's 3 classes: class1" in caplog.text
    assert written["info"]["gdetkd_labels"]["thresholds"]["class0"]["precision"] is None
    assert written["info"]["gdetkd_labels"]["chosen_on"] is None


def test_a_class_whose_name_the_class_map_replaces_is_left_out(tmp_path, cfg_of):
    """The student's class0 is the source's stranger, so the source's own class0 is another class."""
    scene = Scene(tmp_path)
    names = ("class0", "stranger", "class2")
    scene.content["categories"] = [{"id": index, "name": name} for index, name in enumerate(names, 1)]
    scene.write("new.json", scene.content)
    cfg = cfg_of(scene, {"DISTILL.CLASS_MAP": [["class0", "stranger"]]})
    label_images(cfg, scene.perfect(min_score=0.5, validation_results=""))
    given = [item["category_id"] for item in scene.content["annotations"]]
    labels = [item["category_id"] for item in scene.read()["annotations"]]
    assert labels.count(1) == given.count(2) and labels.count(3) == given.count(3) and 2 not in labels


def test_categories_whose_ids_are_text_keep_their_order(tmp_path, cfg_of):
    """Sorted as text, 10 comes before 9."""
    scene = Scene(tmp_path)
    names = {8: "class0", 9: "class1", 10: "class2"}
    for content, path in ((scene.validation, tmp_path / "val" / "val.json"), (tiny(), tmp_path / "tiny.json")):
        content["categories"] = [{"id": str(index), "name": name} for index, name in names.items()]
        for item in content["annotations"]:
            item["category_id"] = str(item["category_id"] + 7)
        path.write_text(json.dumps(content))
    entries = [{**entry, "name": f"{entry['name']}_text"} for entry in scene.keys["DATASETS.REGISTER"]]
    entries[0]["json"] = str(tmp_path / "tiny.json")
    keys = {"DATASETS.TRAIN": ("tiny_text",), "DATASETS.TEST": ("val_text",), "DATASETS.REGISTER": entries}
    label_images(cfg_of(scene, keys), scene.perfect(min_score=0.5, validation_results=""))
    assert [category["name"] for category in scene.read()["categories"]] == list(names.values())


def tiny():
    return json.loads(Path(MetadataCatalog.get("tiny").gdetkd_entry["json"]).read_text())


def test_no_box_has_a_score_of_1(tmp_path, cfg_of):
    """A threshold of 1 leaves out all boxes of a class that is never right."""
    scene = Scene(tmp_path)
    label_images(cfg_of(scene), scene.perfect(results=scene.write("sure.json", results_of(scene.content, 0.999999))))
    assert {item["score"] for item in scene.read()["annotations"]} == {0.99999}


def test_the_printed_entry_is_yaml_for_any_name(tmp_path):
    for stem, folder in (("2024", "new, blurry"), ("no", "a: b"), ("plain", "with #")):
        entry = yaml.safe_load(_entry(tmp_path / f"{stem}.json", str(tmp_path / folder)))
        assert entry == {
            "name": stem, "kind": "pseudo", "json": str(tmp_path / f"{stem}.json"), "images": str(tmp_path / folder)
        }  # fmt: skip


def test_the_config_may_register_the_labels_before_they_exist(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    later = {"name": "later", "kind": "coco", "json": str(scene.output), "images": str(scene.images)}
    cfg = cfg_of(scene, {"DATASETS.REGISTER": [*scene.keys["DATASETS.REGISTER"], later]})
    label_images(cfg, scene.perfect())
    register_datasets(cfg)
    assert len(DatasetCatalog.get("later")) == 8
    missing = {**later, "name": "missing", "json": "no.json"}
    cfg = cfg_of(scene, {"DATASETS.REGISTER": [missing], "DATASETS.TEST": ("missing",)})
    with pytest.raises(GDetKDError, match="no.json"):
        label_images(cfg, scene.perfect())


def test_no_common_class_is_refused(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    scene.content["categories"] = [{"id": index, "name": f"other{index}"} for index in (1, 2, 3)]
    scene.write("new.json", scene.content)
    with pytest.raises(GDetKDError, match="have no name in common"):
        label_images(cfg_of(scene), scene.perfect())


def test_thresholds_of_single_classes(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    label_images(cfg_of(scene), scene.perfect(thresholds={"class1": 0.95}))
    thresholds = scene.read()["info"]["gdetkd_labels"]["thresholds"]
    assert [thresholds[name]["min_score"] for name in ("class0", "class1", "class2")] == [0.9, 0.95, 0.9]
    assert thresholds["class1"]["boxes"] == 0 and thresholds["class1"]["f1"] is None


def test_boxes_are_cut_and_low_scores_are_left_out(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    common = {"image_id": 2, "category_id": 1}
    entries = [
        {**common, "bbox": [-5, 50, 20.004, 40], "score": 0.7},
        {**common, "bbox": [70, 70, 5, 5], "score": 0.7},  # outside of 64 x 64
        {**common, "bbox": [0, 0, 5, 5], "score": 0.04},
        {**common, "bbox": [0, 0, 5, 5], "score": 0.05},
    ]
    results = scene.write("few.json", entries)
    label_images(cfg_of(scene), scene.perfect(results=results, min_score=0.6))
    written = scene.read()["annotations"]
    assert [(a["bbox"], a["area"], a["score"]) for a in written] == [
        ([0.0, 50.0, 15.0, 14.0], 210.0, 0.7),
        ([0.0, 0.0, 5.0, 5.0], 25.0, 0.05),
    ]
    assert scene.read()["info"]["gdetkd_labels"]["thresholds"]["class0"]["boxes"] == 1


def test_processes_share_the_images(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        parts.append(own_part(list(range(8))))
    assert sorted(sum(parts, [])) == list(range(8)) and max(map(len, parts)) - min(map(len, parts)) <= 1


ENTRY = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score": 1.2}, "entry 1 has the score 1.2"),
        ({"score": None}, "entry 1 has the score None"),
        ({"score": float("nan")}, "entry 1 has the score nan"),
        ({"image_id": 99}, "entry 1 has the unknown image_id 99"),
        ({"image_id": [1]}, "entry 1 has the unknown image_id"),
        ({"category_id": 7}, "entry 1 has the unknown category_id 7"),
        ({"bbox": [1, 2, -3, 4]}, "entry 1 has the bbox"),
        ({"bbox": [1, 2, 3]}, "entry 1 has the bbox"),
        ({"bbox": [1, 2, 3, 10**400]}, "entry 1 has the bbox"),
        ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "its boxes seem relative"),
    ],
)
def test_bad_entries_are_refused(tmp_path, cfg_of, change, message):
    scene = Scene(tmp_path)
    entries = [{**ENTRY, "bbox": [0, 0, 1, 1]} if "relative" in message else ENTRY, {**ENTRY, **change}]
    results = scene.write("bad.json", entries)
    with pytest.raises(GDetKDError, match=message):
        label_images(cfg_of(scene), scene.perfect(results=results, min_score=0.5))
    assert not scene.output.exists() and not scene.part.exists()


@pytest.mark.parametrize("content", [{"annotations": []}, [1, 2], "text"])
def test_a_file_that_is_no_list_of_results_is_refused(tmp_path, cfg_of, content):
    scene = Scene(tmp_path)
    with pytest.raises(GDetKDError, match="is not a list of results"):
        label_images(cfg_of(scene), scene.perfect(results=scene.write("bad.json", content), min_score=0.5))


def test_results_may_spell_the_image_ids_as_the_datasets_file_does(tmp_path, cfg_of):
    """GDetKD reads "0007" as the number 7."""
    scene = Scene(tmp_path)
    spelled = [{**result, "image_id": f"{result['image_id']:04d}"} for result in results_of(scene.validation)]
    label_images(cfg_of(scene), scene.perfect(validation_results=scene.write("spelled.json", spelled)))
    assert scene.read()["info"]["gdetkd_labels"]["thresholds"]["class0"]["recall"] == 1.0


def test_bad_files_are_refused(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    cfg = cfg_of(scene)
    (tmp_path / "torn.json").write_text("[{")
    cases = [
        ({"results": str(tmp_path / "torn.json")}, "--results .* is not valid JSON"),
        ({"results": str(tmp_path / "none.json")}, "--results .* cannot be read"),
        ({"annotations": scene.write("empty.json", {"images": []})}, "no list of `images` and `categories`"),
        ({"annotations": ""}, "--results needs --annotations"),
        ({"validation_results": ""}, "Give --min-score, or --validation-results"),
        ({"validation_results": scene.write("x.json", results_of(scene.content))}, "--validation-results .* image_id"),
    ]
    for changes, message in cases:
        with pytest.raises(GDetKDError, match=message):
            label_images(cfg, scene.perfect(**changes))
    for key in ("id", "file_name"):
        twice = json.loads(json.dumps(scene.content))
        twice["images"][0][key] = twice["images"][1][key]
        with pytest.raises(GDetKDError, match=f"two images with the same {key}"):
            label_images(cfg, scene.perfect(annotations=scene.write("twice.json", twice)))
    outside = json.loads(json.dumps(scene.content))
    outside["images"][0]["file_name"] = "../secret.png"
    with pytest.raises(GDetKDError, match="stays in the folder of --images"):
        label_images(cfg, scene.perfect(annotations=scene.write("outside.json", outside)))


def test_an_image_that_exif_turns_has_its_turned_size(tmp_path, cfg_of):
    scene = Scene(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 80)).save(scene.images / "new0.jpg", exif=exif)
    scene.content["images"][0].update(file_name="new0.jpg")  # annotated as 80 x 64
    scene.write("new.json", scene.content)
    label_images(cfg_of(scene), scene.perfect(min_score=0.5))
    [image] = [item for item in scene.read()["images"] if item["file_name"] == "new0.jpg"]
    assert (image["width"], image["height"]) == (80, 64)
