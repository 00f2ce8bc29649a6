"""Exact detections have an AP of 100, whatever ids, types, orders and counts an annotation tool writes.

Each change below keeps the meaning of the file. Training must see every object, and the evaluation must count every
object that is found.
"""

import json
import random
import unicodedata

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.engine.evaluators import build_evaluator
from gdetkd.errors import GDetKDError

COUNT = 6


def of_each(key, function):
    """Return a change of the file's content: call a function for each item of a list."""
    return lambda content: [function(item) for item in content[key]]


def annotations(function):
    return of_each("annotations", function)


def drop(*keys):
    return lambda item: [item.pop(key) for key in keys]


def renamed_images(name):
    """Return a change of the image ids, in images and annotations."""
    return lambda content: [
        *of_each("images", lambda item: item.update(id=name(item["id"])))(content),
        *annotations(lambda item: item.update(image_id=name(item["image_id"])))(content),
    ]


def shuffled(content):
    for key in ("images", "annotations", "categories"):
        random.Random(0).shuffle(content[key])


def as_text(content):
    for image in content["images"]:
        image.update(width=str(image["width"]), height=str(image["height"]))
    for item in content["annotations"]:
        item.update(
            bbox=[str(value) for value in item["bbox"]], area=str(item["area"]), iscrowd="0", id=str(item["id"])
        )


def swap(item):
    x, y, width, height = item["bbox"]
    item["bbox"] = [x + width, y + height, -width, -height]


CHANGES = {
    "as it is": lambda content: None,
    "image sizes with a decimal point": of_each(
        "images", lambda item: item.update(width=float(item["width"]), height=float(item["height"]))
    ),
    "annotation ids from 0": annotations(lambda item: item.update(id=item["id"] - 1)),
    "annotation ids as text": annotations(lambda item: item.update(id=f"a{item['id']}")),
    "annotation ids that occur twice": annotations(lambda item: item.update(id=7)),
    "no annotation ids": annotations(drop("id")),
    "image ids of annotations as text": annotations(lambda item: item.update(image_id=str(item["image_id"]))),
    "image ids as text": of_each("images", lambda item: item.update(id=str(item["id"]))),
    "image ids of half of the annotations as text": annotations(
        lambda item: item.update(image_id=str(item["image_id"]) if item["id"] % 2 else item["image_id"])
    ),
    "image ids as floats": annotations(lambda item: item.update(image_id=float(item["image_id"]))),
    "image ids that are names": renamed_images(lambda number: f"image{number}"),
    "image ids with leading zeros": renamed_images(lambda number: f"{number:06}"),
    "image ids with leading zeros, numbers in annotations": of_each(
        "images", lambda item: item.update(id=f"{item['id']:06}")
    ),
    "image ids with underscores": renamed_images(lambda number: f"2023_{number:02}"),
    "image ids that are numbers and names": renamed_images(lambda number: f"image{number}" if number % 2 else number),
    "image ids that are numbers, some with leading zeros": renamed_images(lambda number: f"{number:0{1 + number % 2}}"),
    "image ids from 0": lambda content: [
        *of_each("images", lambda item: item.update(id=item["id"] - 1))(content),
        *annotations(lambda item: item.update(image_id=item["image_id"] - 1))(content),
    ],
    "category ids as text": lambda content: [
        *of_each("categories", lambda item: item.update(id=str(item["id"])))(content),
        *annotations(lambda item: item.update(category_id=str(item["category_id"])))(content),
    ],
    "category ids with leading zeros": lambda content: [
        *of_each("categories", lambda item: item.update(id=f"{item['id']:02}"))(content),
        *annotations(lambda item: item.update(category_id=f"{item['category_id']:02}"))(content),
    ],
    "category ids from 0": lambda content: [
        *of_each("categories", lambda item: item.update(id=item["id"] - 1))(content),
        *annotations(lambda item: item.update(category_id=item["category_id"] - 1))(content),
    ],
    "category ids with gaps": lambda content: [
        *of_each("categories", lambda item: item.update(id=10 * item["id"]))(content),
        *annotations(lambda item: item.update(category_id=10 * item["category_id"]))(content),
    ],
    "another order": shuffled,
    "numbers as text": as_text,
    "no area": annotations(drop("area")),
    "no iscrowd": annotations(drop("iscrowd")),
    "neither area nor iscrowd nor id": annotations(drop("area", "iscrowd", "id")),
    "iscrowd null": annotations(lambda item: item.update(iscrowd=None)),
    "iscrowd false": annotations(lambda item: item.update(iscrowd=False)),
    "two corners for a polygon": annotations(lambda item: item.update(segmentation=[[1, 2, 3, 4]])),
    "an empty polygon": annotations(lambda item: item.update(segmentation=[[]])),
    "two corners for some polygons": annotations(
        lambda item: item.update(segmentation=[[1, 2, 3, 4]] if item["id"] % 2 else [[5, 5, 20, 5, 20, 20]])
    ),
    "swapped corners": annotations(swap),
    "spaces around class names": of_each("categories", lambda item: item.update(name=f" {item['name']} ")),
    "backslashes in file names": of_each("images", lambda item: item.update(file_name=f".\\{item['file_name']}")),
    "another case of file names": of_each("images", lambda item: item.update(file_name=item["file_name"].upper())),
    "boxes without area beside the others": lambda content: content["annotations"].append(
        {**content["annotations"][0], "id": 999, "bbox": [5, 5, 0, 0], "area": 0}
    ),
    "boxes outside beside the others": lambda content: content["annotations"].append(
        {**content["annotations"][0], "id": 999, "bbox": [500, 5, 10, 10]}
    ),
}
CHANGES_THAT_NEED_NO_CORRECTION = (
    "image ids from 0",
    "image ids that are names",
    "image ids with leading zeros",
    "image ids with underscores",
    "image ids that are numbers, some with leading zeros",
    "category ids from 0",
    "category ids with gaps",
)


def register_changed(folder, change, encoding="utf-8", **keys):
    """Register the dataset "exact" from a changed file.

    Returns:
        the config, and the objects of each image before the change: (x, y, width, height) and class name.
    """
    write_coco(folder, COUNT, name="exact")
    content = json.loads((folder / "exact.json").read_text())
    objects = {}
    for item in content["annotations"]:
        name = content["images"][item["image_id"] - 1]["file_name"]
        objects.setdefault(name, []).append((item["bbox"], f"class{item['category_id'] - 1}"))
    change(content)
    (folder / "exact.json").write_text(json.dumps(content), encoding=encoding)
    entry = {"name": "exact", "kind": "coco", "json": str(folder / "exact.json"), "images": str(folder)}
    names = {"DATASETS.TRAIN": ("exact",), "DATASETS.TEST": ("exact",), "OUTPUT_DIR": str(folder / "run")}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], **names, **keys})
    register_datasets(cfg)
    return cfg, objects


def ap_of_exact_detections(cfg, objects):
    """Return the AP (percent) of detections that equal the objects."""
    check_datasets(cfg)
    evaluator = build_evaluator(cfg, "exact")
    evaluator.reset()
    classes = [name.strip() for name in MetadataCatalog.get("exact").thing_classes]
    for sample in DatasetCatalog.get("exact"):
        found = objects[sample["file_name"].replace("\\", "/").rsplit("/", 1)[-1]]
        corners = [[x, y, x + width, y + height] for (x, y, width, height), _ in found]
        instances = Instances((sample["height"], sample["width"]))
        instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        instances.scores = torch.ones(len(found))
        instances.pred_classes = torch.tensor([classes.index(name) for _, name in found])
        evaluator.process([sample], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("implementation", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_exact_detections_have_an_ap_of_100(tmp_path, change, implementation):
    cfg, objects = register_changed(tmp_path, CHANGES[change], **{"TEST.COCO_EVAL": implementation})
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)
    assert sum(len(image["annotations"]) for image in DatasetCatalog.get("exact")) == sum(map(len, objects.values()))


def test_a_byte_order_mark_is_skipped(tmp_path):
    cfg, objects = register_changed(tmp_path, lambda content: None, encoding="utf-8-sig")
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)


def test_file_names_may_have_another_form_of_accents(tmp_path):
    def change(content):
        image = content["images"][0]
        (tmp_path / image["file_name"]).rename(tmp_path / unicodedata.normalize("NFD", "café.png"))
        image["file_name"] = unicodedata.normalize("NFC", "café.png")

    cfg, _ = register_changed(tmp_path, change)
    check_datasets(cfg)
    assert "caf" in DatasetCatalog.get("exact")[0]["file_name"]


def test_ap_counts_up_to_detections_per_image(tmp_path):
    """COCO's metrics count 100 detections an image, so 150 exact detections of 150 objects have an AP of 66.34."""
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(tmp_path / "one.png")
    boxes = [[13 * (i % 15), 13 * (i // 15), 10, 10] for i in range(150)]
    found = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "one.png", "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "dot"}],
        "annotations": found,
    }
    (tmp_path / "exact.json").write_text(json.dumps(content))
    entry = {"name": "exact", "kind": "coco", "json": str(tmp_path / "exact.json"), "images": str(tmp_path)}
    for count, expected in ((150, 100.0), (100, 66.34)):
        cfg = make_cfg({"DATASETS.REGISTER": [entry], "TEST.DETECTIONS_PER_IMAGE": count, "DATASETS.TEST": ("exact",)})
        cfg.merge_from_list(["DATASETS.TRAIN", ("exact",), "OUTPUT_DIR", str(tmp_path / "run")])
        register_datasets(cfg)
        assert ap_of_exact_detections(cfg, {"one.png": [(box, "dot") for box in boxes]}) == pytest.approx(
            expected, abs=0.01
        )


@pytest.mark.parametrize("share, refused", [(0.5, True), (1.0, True), (0.05, False)])
def test_annotations_of_no_image_are_left_out_up_to_a_share(tmp_path, caplog, share, refused):
    def change(content):
        number = max(1, round(share * len(content["annotations"])))
        for item in content["annotations"][:number]:
            item["image_id"] = 77

    cfg, objects = register_changed(tmp_path, change, **{"INPUT.MAX_BAD_FRACTION": 0.2})
    if refused:
        with pytest.raises(
            GDetKDError, match="annotations are of no image of the file, the first with image_id 77.*0.2"
        ):
            check_datasets(cfg)
    else:
        check_datasets(cfg)
        assert "1 annotations are of no image and are left out" in caplog.text


@pytest.mark.parametrize("name, change", [(n, c) for n, c in CHANGES.items() if n not in ("as it is", "another order")])
def test_a_correction_is_logged_once(tmp_path, caplog, name, change):
    register_changed(tmp_path, change)
    for _ in range(3):
        DatasetCatalog.get("exact")
    warnings = [message for message in caplog.messages if message.startswith("exact: ")]
    assert len(warnings) == (0 if name in CHANGES_THAT_NEED_NO_CORRECTION else 1), warnings


def test_an_object_with_an_invalid_polygon_keeps_its_box(tmp_path, caplog):
    register_changed(tmp_path, CHANGES["two corners for some polygons"])
    found = [item for image in DatasetCatalog.get("exact") for item in image["annotations"]]
    assert {"segmentation" in item for item in found} == {True, False} and all("bbox" in item for item in found)
    assert "objects have polygons of fewer than three corners; they keep their box" in caplog.text
