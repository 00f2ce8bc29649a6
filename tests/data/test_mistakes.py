"""Annotations that can be read but cannot be meant are warned of, with a count, or refused."""

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


def test_sound_boxes_are_not_spoken_of():
    boxes = ([5, 5, 20, 20], [0, 0, 64, 48], [40, 30, 30, 30])
    assert find_mistakes(images(*boxes, categories=[0, 1, 1]), ["cat", "dog"], "mine") == []
    assert find_mistakes([{"file_name": "a.png"}], ["cat"], "mine") == []


def test_boxes_in_units_of_the_image_are_refused(tmp_path):
    dataset(tmp_path, with_boxes([0.1, 0.1, 0.5, 0.5], [0.4, 0.2, 0.6, 0.8]))
    with pytest.raises(GDetKDError, match="'mine' has its 2 boxes in units of the image.*Multiply x and width"):
        DatasetCatalog.get("mine")


def test_one_small_box_among_others_is_no_unit():
    assert find_mistakes(images([0, 0, 1, 1], [5, 5, 20, 20]), ["cat"], "mine") == []


@pytest.mark.parametrize("boxes, count", [([[30, 20, 60, 40]] * 3, 3), ([[30, 20, 60, 40], [1, 1, 9, 9]], 0)])
def test_boxes_that_look_like_two_corners(boxes, count):
    warnings = [each for each in find_mistakes(images(*boxes), ["cat"], "mine") if "two corners" in each]
    assert bool(warnings) == bool(count) and (not count or f"{count} of {len(boxes)} boxes" in warnings[0])


def test_corners_that_are_said_to_be_corners_are_right():
    warnings = find_mistakes(images([30, 20, 60, 40], mode=BoxMode.XYXY_ABS), ["cat"], "mine")
    assert warnings == []


def test_doubles_and_classes(tmp_path, caplog):
    dicts = images([5, 5, 9, 9], [5, 5, 9, 9], [6, 6, 9, 9])
    said = "; ".join(find_mistakes(dicts, ["cat", "group", "cat"], "mine"))
    assert (
        "1 annotations repeat another with the same image" in said
        and "1 class names stand for several classes (cat)" in said
    )
    assert "2 of 3 classes have no object (group, cat)" in said
    dataset(tmp_path, with_boxes([5, 5, 9, 9]))
    for _ in range(2):
        DatasetCatalog.get("mine")
    assert caplog.text.count("mine: 2 of 3 classes have no object (class1, class2): remove") == 1


def spec(*names):
    return DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, len(names), None, class_names=names)


@pytest.mark.parametrize("student, teacher", [(("dot", "dot"), ("dot", "box")), (("dot", "box"), ("dot", "dot"))])
def test_a_class_is_not_taught_to_two(student, teacher):
    """A teacher that was 80 % sure of a circle gave 0.445 to each of two classes of that name."""
    with pytest.raises(GDetKDError, match="two student classes, 'dot' and 'dot'|2 classes with the name 'dot'"):
        match_classes("CLS", make_cfg({}), spec(*student), spec(*teacher))


def test_the_entry_of_a_config_counts_where_the_catalog_has_another_of_that_name(tmp_path):
    """Detectron2's tutorial calls every dataset my_dataset_train: a teacher's file and the student's both do."""
    students, teachers = tmp_path / "student", tmp_path / "teacher"
    for folder in (students, teachers):
        folder.mkdir()
        write_coco(folder, 2, name="mine")
    path = teachers / "mine.json"
    path.write_text(path.read_text().replace("class0", "other").replace("class2", "class0"))
    entries = [
        {"name": "same_name", "kind": "coco", "json": str(f / "mine.json"), "images": str(f)}
        for f in (students, teachers)
    ]
    own, teacher = (make_cfg({"DATASETS.REGISTER": [e], "DATASETS.TRAIN": ("same_name",)}) for e in entries)
    register_datasets(own)
    assert class_names(teacher) == ("other", "class1", "class0")  # before and after the student's is read
    DatasetCatalog.get("same_name")
    assert class_names(teacher) == ("other", "class1", "class0")
    assert class_names(own) == tuple(MetadataCatalog.get("same_name").thing_classes) == ("class0", "class1", "class2")
