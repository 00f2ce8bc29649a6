"""Mistakes in VOC's layout cause a warning or an error, which names the item and the remedy."""

import re
import shutil

import pytest
from detectron2.data import DatasetCatalog
from test_exact_detections import COUNT, ap_of_exact_detections
from test_exact_detections_voc import CLASSES, NO_SPLIT, each_xml, flat, register_changed, replace, write_voc

from gdetkd.data import register_datasets
from gdetkd.errors import GDetKDError


def test_a_box_that_reaches_over_the_edge_by_a_pixel_is_cut(tmp_path, caplog):
    register_changed(tmp_path, replace("<xmax>.*?</xmax>", "<xmax>65</xmax>"))
    found = [
        box["bbox"] for image in DatasetCatalog.get("exact") for box in image["annotations"] if image["width"] == 64
    ]
    assert found and all(box[2] == 64 for box in found)
    assert f"{len(found)} boxes reach over the edge by a pixel and are cut there" in caplog.text


def test_boxes_that_look_like_widths_and_heights_cause_a_warning(tmp_path, caplog):
    def prepare(objects):
        for found in objects.values():
            found[:] = [([40, 30, 20 + 1, 10 + 1], name) for _, name in found]

    change = each_xml(lambda text: text.replace("<xmax>61</xmax><ymax>41", "<xmax>21</xmax><ymax>11"))
    register_changed(tmp_path, change, prepare)
    DatasetCatalog.get("exact")
    assert "boxes look like x, y, width and height in place of two corners" in caplog.text


def test_boxes_in_units_of_the_image_are_refused(tmp_path):
    register_changed(tmp_path, replace(r"<([xy]m..)>\d+<", r"<\1>0.5<"))
    with pytest.raises(GDetKDError, match="boxes in units of the image"):
        DatasetCatalog.get("exact")


def test_unknown_classes_are_all_named_with_counts(tmp_path):
    register_changed(tmp_path, classes=["Class0"])
    with pytest.raises(GDetKDError) as error:
        DatasetCatalog.get("exact")
    total = [name for objects in write_voc(tmp_path / "again").values() for _, name in objects]
    for name in CLASSES:
        assert f"'{name}' ({total.count(name)}, first in exact" in str(error.value)
    assert "'class0' may be 'Class0'" in str(error.value) and "Add these names to `classes`" in str(error.value)


def test_without_classes_the_error_lists_them(tmp_path):
    register_changed(tmp_path, classes=None)
    with pytest.raises(GDetKDError, match=r"List them as `classes: \[class0, class1, class2\]`"):
        DatasetCatalog.get("exact")


def test_a_class_without_objects_and_repeated_objects_cause_warnings(tmp_path, caplog):
    register_changed(
        tmp_path, each_xml(lambda t: re.sub("(<object>.*</object>)", r"\1\1", t)), classes=[*CLASSES, "none"]
    )
    DatasetCatalog.get("exact")
    assert (
        "annotations repeat another with the same image" in caplog.text
        and "1 of 4 classes have no object (none)" in caplog.text
    )


@pytest.mark.parametrize("most, refused", [(0.5, False), (0.01, True)])
def test_listed_images_without_an_annotation_are_left_out_up_to_a_share(tmp_path, caplog, most, refused):
    cfg, _ = register_changed(tmp_path, lambda folder: (folder / "Annotations/exact1.xml").unlink())
    if refused:
        with pytest.raises(GDetKDError, match="1 of 6 images of a list .*exact1.xml.*MAX_BAD_FRACTION 0.01"):
            DatasetCatalog.get("exact")
        return
    DatasetCatalog.remove("exact")
    cfg.INPUT.MAX_BAD_FRACTION = most
    register_datasets(cfg)
    assert len(DatasetCatalog.get("exact")) == COUNT - 1
    assert "1 listed images have no annotation and are left out" in caplog.text


def test_images_without_an_annotation_in_a_flat_folder_are_counted(tmp_path, caplog):
    register_changed(tmp_path, lambda folder: [flat(folder), (folder / "train/exact1.xml").unlink()])
    assert len(DatasetCatalog.get("exact")) == COUNT - 1
    assert "1 images have no annotation and are skipped" in caplog.text


def give_an_annotation_two_images(folder):
    shutil.copy(folder / "JPEGImages/exact1.png", folder / "JPEGImages/exact1.jpg")
    each_xml(lambda text: text.replace("exact1.png", "other.png"))(folder)


def give_two_annotations_one_image(folder):
    (folder / "JPEGImages/exact1.png").unlink()
    each_xml(lambda text: text.replace("exact1.png", "exact2.png"))(folder)


@pytest.mark.parametrize(
    "change, match",
    [
        (give_an_annotation_two_images, "exact1.xml' could be of exact1.jpg or exact1.png"),
        (give_two_annotations_one_image, "exact1.xml' and .*exact2.xml' are both annotations of .*exact2.png"),
    ],
)
def test_ambiguous_pairs_of_image_and_annotation_are_refused(tmp_path, change, match):
    register_changed(tmp_path, change)
    with pytest.raises(GDetKDError, match=match):
        DatasetCatalog.get("exact")


@pytest.mark.parametrize(
    "change, entry, match",
    [
        (
            lambda f: shutil.copy(f / "ImageSets/Main/train.txt", f / "ImageSets/Main/val.txt"),
            NO_SPLIT,
            r"\(train, val\)",
        ),
        (flat, {"split": "valid"}, "no ImageSets/Main/valid.txt.*It has the folders train"),
        (flat, NO_SPLIT, "It has the folders train"),
        (lambda f: None, {"first_pixel": 2}, "has first_pixel 2, not 0 or 1"),
        (lambda f: None, {"classes": ["a", False]}, "classes .*not a list of texts"),
        (
            lambda f: [(f / "labelmap.txt").write_text("a:::"), (f / "classes.txt").write_text("b")],
            {"classes": None},
            "list different classes",
        ),
    ],
)
def test_invalid_layouts_and_entries_are_refused(tmp_path, change, entry, match):
    with pytest.raises(GDetKDError, match=match):
        register_changed(tmp_path, change, **entry)


def test_a_missing_image_without_a_size_is_reported(tmp_path):
    cfg, objects = register_changed(
        tmp_path, lambda f: [(f / "JPEGImages/exact1.png").unlink(), replace("<size>.*</size>", "")(f)]
    )
    with pytest.raises(GDetKDError, match="1 of 6 images cannot be used for evaluation .exact1.png not there"):
        ap_of_exact_detections(cfg, objects)
