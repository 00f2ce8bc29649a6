"""Problems in a user's data are left out or refused, with counts, before training."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from conftest import make_cfg, write_coco
from gdetkd.data import build_train_loader, register_datasets
from gdetkd.data.clean import find_bad_images
from gdetkd.engine import DistillTrainer
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.engine.evaluators import build_evaluator
from gdetkd.errors import GDetKDError

BOX = {"area": 100, "iscrowd": 0, "category_id": 1, "image_id": 1}


def dataset(folder, change=lambda content: None, count=4, **entry):
    """Write and register the dataset "mine", and return a config that trains on it.

    The images have 64x64 pixels, but the first and every third one 80x64.

    Args:
        change: changes the content of the JSON file in place.
    """
    write_coco(folder, count, name="mine")
    content = json.loads((folder / "mine.json").read_text())
    change(content)
    (folder / "mine.json").write_text(json.dumps(content))
    entry = {"name": "mine", "kind": "coco", "json": str(folder / "mine.json"), "images": str(folder), **entry}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("mine",), "OUTPUT_DIR": str(folder / "run")})
    register_datasets(cfg)
    return cfg


def with_boxes(*boxes, **changes):
    def change(content):
        content["annotations"] = [{**BOX, "id": i + 1, "bbox": box, **changes} for i, box in enumerate(boxes)]

    return change


def test_annotations_of_each_kind_are_counted_once(tmp_path, caplog):
    boxes = [
        [5, 5, 0, 9],
        [5, 5, 9, -3],
        [5, 5, float("nan"), 9],
        [5, 5, 9, float("inf")],
        [90, 5, 9, 9],
        [-20, 5, 20, 9],
        [70, 5, 30, 9],
    ]
    dataset(tmp_path, with_boxes(*boxes, [5, 5, 9, 9]))
    for _ in range(2):
        kept = [a["bbox"] for a in DatasetCatalog.get("mine")[0]["annotations"]]
        assert kept == [[5, 2, 9, 3], [70, 5, 30, 9], [5, 5, 9, 9]]  # the corners of the first box are put in order
    warning = (
        "mine: 1 boxes have their corners in another order; 3 annotations without area are left out; 2 annotations out"
    )
    assert caplog.text.count(warning) == 1
    assert "1 boxes reach over the edge" in caplog.text


def test_crowds_are_counted_and_stay(tmp_path, caplog):
    dataset(tmp_path, with_boxes([5, 5, 9, 9], [15, 5, 9, 9], iscrowd=1))
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 2
    assert "2 are crowds" in caplog.text


def test_sound_annotations_cause_no_warning(tmp_path, caplog):
    def change(content):
        with_boxes([0, 0, 80, 64], [5, 5, 9, 9], [6, 6, 9, 9])(content)
        for index, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = index + 1

    dataset(tmp_path, change)
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 3
    assert "mine:" not in caplog.text


def test_category_ids_may_skip_numbers(tmp_path):
    def change(content):
        with_boxes([5, 5, 9, 9], category_id=90)(content)
        content["categories"] = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]

    dataset(tmp_path, change)
    assert DatasetCatalog.get("mine")[0]["annotations"][0]["category_id"] == 1
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "change, match",
    [
        (with_boxes([5, 5, 9, 9], category_id=17), "category_id=17"),
        (lambda content: content.pop("categories"), "cannot be read from .*mine.json"),
        (with_boxes("no box at all"), "cannot be read from .*mine.json"),
    ],
)
def test_an_unusable_json_is_refused(tmp_path, change, match):
    dataset(tmp_path, change)
    with pytest.raises(GDetKDError, match=match) as error:
        DatasetCatalog.get("mine")
    assert "DATASETS.REGISTER" in str(error.value)


def test_a_truncated_json_is_refused(tmp_path):
    dataset(tmp_path)
    (tmp_path / "mine.json").write_text((tmp_path / "mine.json").read_text()[:100])
    with pytest.raises(GDetKDError, match="mine.json.*JSONDecodeError"):
        DatasetCatalog.get("mine")


def break_images(folder):
    """Break three of four images: remove one, overwrite one with text, and give one another size."""
    (folder / "mine0.png").unlink()
    (folder / "mine1.png").write_bytes(b"<html>404</html>")
    Image.new("RGB", (64, 50)).save(folder / "mine2.png")


def test_an_image_that_is_too_large_does_not_open(tmp_path, monkeypatch):
    dataset(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    reasons = set(find_bad_images(DatasetCatalog.get("mine")).values())
    assert reasons == {"does not open (DecompressionBombError)"}


def test_unusable_images_are_found_with_a_reason(tmp_path):
    dataset(tmp_path)
    assert find_bad_images(DatasetCatalog.get("mine")) == {}
    break_images(tmp_path)
    bad = find_bad_images(DatasetCatalog.get("mine"))
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in bad.items()}
    assert reasons == {
        "mine0.png": "not there",
        "mine1.png": "does not open (UnidentifiedImageError)",
        "mine2.png": "is 64x50, annotated as 64x64",
    }


def test_an_image_that_exif_turns_has_the_turned_size(tmp_path):
    write_coco(tmp_path, 1, name="mine")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 80)).save(tmp_path / "turned.jpg", exif=exif)
    sample = {"file_name": str(tmp_path / "turned.jpg"), "width": 80, "height": 64}
    assert find_bad_images([sample]) == {} and find_bad_images([{**sample, "width": 64, "height": 80}])


def test_few_bad_images_are_left_out_of_training_and_many_stop_it(tmp_path, caplog):
    cfg = dataset(tmp_path)
    break_images(tmp_path)
    with pytest.raises(GDetKDError, match=r"mine: 3 of 4 images .*mine0.png not there.*INPUT.MAX_BAD_FRACTION 0.01"):
        build_train_loader(cfg)
    cfg.INPUT.MAX_BAD_FRACTION = 0.75
    batch = next(iter(build_train_loader(cfg)))
    assert {sample["file_name"].rsplit("/", 1)[1] for sample in batch} == {"mine3.png"}
    assert "3 of 4 images cannot be used" in caplog.text and "They are left out" in caplog.text


def test_a_bad_image_of_a_test_set_is_named_before_training(tmp_path):
    cfg = dataset(tmp_path)
    break_images(tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny",), ("mine",)
    with pytest.raises(GDetKDError, match="mine: 3 of 4 images cannot be used for evaluation"):
        check_datasets(cfg)


def test_a_voc_class_that_the_entry_does_not_list_is_refused(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("1\n")
    (tmp_path / "Annotations/1.xml").write_text(
        "<annotation><size><width>9</width><height>9</height></size><object><name>cow</name><bndbox><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
    )
    entry = {"name": "mine", "kind": "voc", "root": str(tmp_path), "split": "train", "classes": ["cat"]}
    register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))
    with pytest.raises(GDetKDError, match=r"among its `classes`: 'cow' \(1, first in 1.xml\)"):
        DatasetCatalog.get("mine")
    (tmp_path / "Annotations/1.xml").write_text("<annotation>")
    with pytest.raises(GDetKDError, match="ParseError"):
        DatasetCatalog.get("mine")


def test_images_without_labels_are_predicted_on_but_not_trained_on(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / name, format="PNG")
    entry = {"name": "mine", "kind": "images", "images": str(tmp_path)}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TEST": ("mine",), "OUTPUT_DIR": str(tmp_path / "run")})
    register_datasets(cfg)
    assert [sample["image_id"] for sample in DatasetCatalog.get("mine")] == ["a.png", "b.JPG"]
    cfg.TEST.EVAL_PERIOD = 2
    DistillTrainer(cfg).train()
    written = json.loads((tmp_path / "run/inference/mine_detections.json").read_text())
    assert {detection["image_id"] for detection in written} == {"a.png", "b.JPG"}
    assert set(written[0]) == {"image_id", "category_id", "bbox", "score"}
    cfg.DATASETS.TRAIN = ("mine",)
    with pytest.raises(GDetKDError, match="'mine' in DATASETS.TRAIN has images without labels"):
        check_datasets(cfg)


def test_detections_of_all_batches_are_written(tmp_path):
    entry = {"name": "mine", "kind": "images", "images": str(tmp_path)}
    register_datasets(make_cfg({"DATASETS.REGISTER": [entry]}))
    evaluator = build_evaluator(make_cfg({"OUTPUT_DIR": str(tmp_path)}), "mine")
    evaluator.reset()
    for name in ("a", "b"):
        found = Instances((10, 10))
        found.pred_boxes, found.scores = Boxes(torch.tensor([[1.0, 2.0, 4.0, 6.0]])), torch.tensor([0.5])
        found.pred_classes = torch.tensor([2])
        evaluator.process([{"image_id": name}], [{"instances": found}])
    assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "inference/mine_detections.json").read_text())
    expected = {"category_id": 2, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}
    assert written == [{"image_id": name, **expected} for name in ("a", "b")]


def test_a_dataset_can_be_registered_on_the_command_line(tmp_path):
    write_coco(tmp_path, 2, name="mine")
    cfg = make_cfg({})
    entry = f"[{{'name': 'mine', 'kind': 'coco', 'json': '{tmp_path}/mine.json', 'images': '{tmp_path}'}}]"
    cfg.merge_from_list(["DATASETS.REGISTER", entry, "DATASETS.TRAIN", "('mine',)"])
    register_datasets(cfg)
    check_datasets(cfg)
    assert len(DatasetCatalog.get("mine")) == 2
