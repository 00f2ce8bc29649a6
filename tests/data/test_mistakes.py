"""Annotations that can be read but are probably a mistake cause a warning with a count, or are refused."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from test_clean import dataset, with_boxes

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.class_names import class_names
from gdetkd.data.mistakes import find_mistakes
from gdetkd.errors import GDetKDError
from gdetkd.losses.classes import match_classes
from gdetkd.structures import DetectorSpec


def images(*boxes, mode=BoxMode.XYWH_ABS, size=(64, 48), categories=None):
    categories = categories or [0] * len(boxes)
    found = [{"bbox": box, "bbox_mode": mode, "category_id": c} for box, c in zip(boxes, categories)]
    return [{"file_name": "a.png", "width": size[0], "height": size[1], "annotations": found}]


def test_sound_boxes_cause_no_warning():
    boxes = ([5, 5, 20, 20], [0, 0, 64, 48], [40, 30, 30, 30])
    assert find_mistakes(images(*boxes, categories=[0, 1, 1]), ["cat", "dog"], "mine") == []
    assert find_mistakes([{"file_name": "a.png"}], ["cat"], "mine") == []


def test_boxes_in_units_of_the_image_are_refused(tmp_path):
    dataset(tmp_path, with_boxes([0.1, 0.1, 0.5, 0.5], [0.4, 0.2, 0.6, 0.8]))
    with pytest.raises(GDetKDError, match="'mine' has its 2 boxes in units of the image.*Multiply x and width"):
        DatasetCatalog.get("mine")


def test_one_small_box_among_other_boxes_is_accepted():
    assert find_mistakes(images([0, 0, 1, 1], [5, 5, 20, 20]), ["cat"], "mine") == []


@pytest.mark.parametrize("boxes, count", [([[30, 20, 60, 40]] * 3, 3), ([[30, 20, 60, 40], [1, 1, 9, 9]], 0)])
def test_boxes_that_look_like_two_corners_cause_a_warning(boxes, count):
    warnings = [text for text in find_mistakes(images(*boxes), ["cat"], "mine") if "two corners" in text]
    assert bool(warnings) == bool(count) and (not count or f"{count} of {len(boxes)} boxes" in warnings[0])


def test_boxes_that_are_declared_as_two_corners_cause_no_warning():
    warnings = find_mistakes(images([30, 20, 60, 40], mode=BoxMode.XYXY_ABS), ["cat"], "mine")
    assert warnings == []


def test_repeated_annotations_and_doubtful_classes_cause_warnings(tmp_path, caplog):
    dicts = images([5, 5, 9, 9], [5, 5, 9, 9], [6, 6, 9, 9])
    warnings = "; ".join(find_mistakes(dicts, ["cat", "group", "cat"], "mine"))
    assert "1 annotations repeat another with the same image" in warnings
    assert "1 class names stand for several classes (cat)" in warnings
    assert "2 of 3 classes have no object (group, cat)" in warnings
    dataset(tmp_path, with_boxes([5, 5, 9, 9]))
    for _ in range(2):
        DatasetCatalog.get("mine")
    assert caplog.text.count("mine: 2 of 3 classes have no object (class1, class2): remove") == 1


def test_two_entries_of_one_file_cause_a_warning():
    warnings = find_mistakes(images([5, 5, 9, 9]) + images([6, 6, 9, 9]), ["cat"], "mine")
    assert warnings == [
        "1 images have the file of another image, so the objects of each are background in the other: merge their "
        "annotations"
    ]


def spec(*names):
    return DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, len(names), None, class_names=names)


@pytest.mark.parametrize("student, teacher", [(("dot", "dot"), ("dot", "box")), (("dot", "box"), ("dot", "dot"))])
def test_two_classes_with_one_name_are_refused(student, teacher):
    """Otherwise, a teacher that is 80 % sure of a class would give 0.445 to each of two classes with that name."""
    with pytest.raises(GDetKDError, match="two student classes, 'dot' and 'dot'|2 classes with the name 'dot'"):
        match_classes("CLS", make_cfg({}), spec(*student), spec(*teacher))


def test_the_configs_own_entry_counts_if_the_catalog_has_another_dataset_of_that_name(tmp_path):
    """Teacher and student may use one name for two datasets, such as my_dataset_train of Detectron2's tutorial."""
    folders = tmp_path / "student", tmp_path / "teacher"
    for folder in folders:
        folder.mkdir()
        write_coco(folder, 2, name="mine")
    path = tmp_path / "teacher" / "mine.json"
    path.write_text(path.read_text().replace("class0", "other").replace("class2", "class0"))
    entries = [
        {"name": "same_name", "kind": "coco", "json": str(folder / "mine.json"), "images": str(folder)}
        for folder in folders
    ]
    student, teacher = (make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("same_name",)}) for entry in entries)
    register_datasets(student)
    assert class_names(teacher) == ("other", "class1", "class0")
    DatasetCatalog.get("same_name")  # reads the student's dataset
    assert class_names(teacher) == ("other", "class1", "class0")
    names = ("class0", "class1", "class2")
    assert class_names(student) == tuple(MetadataCatalog.get("same_name").thing_classes) == names
