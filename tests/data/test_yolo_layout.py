"""Mistakes in YOLO's layout are refused with file, line and remedy, and paths stay in their folder."""

import shutil

import pytest
from detectron2.data import DatasetCatalog
from test_exact_detections import COUNT, ap_of_exact_detections
from test_exact_detections_yolo import (
    BY_FOLDER,
    CLASSES,
    NAMES,
    each_line,
    listed,
    pose,
    register_changed,
    roboflow,
    write_yolo,
    yaml,
)

from conftest import make_cfg
from gdetkd.data.class_names import class_names
from gdetkd.data.clean import without_bad_images
from gdetkd.data.kinds.yolo_files import LabelFinder
from gdetkd.errors import GDetKDError


def test_an_unreadable_image_is_reported_by_the_check_of_images(tmp_path):
    cfg, objects = register_changed(
        tmp_path, lambda folder: (folder / "images/train/exact1.png").write_bytes(b"<html>")
    )
    with pytest.raises(GDetKDError, match="1 of 6 images cannot be used for evaluation .exact1.png does not open"):
        ap_of_exact_detections(cfg, objects)


@pytest.mark.parametrize(
    "line, match",
    [
        ("3 0.5 0.5 0.1 0.1", "the class is 3, but there are 3 classes"),
        ("-1 0.5 0.5 0.1 0.1", "the class is -1"),
        ("0.5 0.5 0.5 0.1 0.1", "the class is 0.5"),
        ("nan 0.5 0.5 0.1 0.1", "the class is nan"),
        ("cat 0.5 0.5 0.1 0.1", "'cat' is not a number"),
        ("0 32 20 10 10", "it has 32, which is not a share of the image from 0 to 1. Divide pixels"),
        ("0 0.5 0.5 inf 0.1", "it has inf"),
        ("0 0.5 0.5 0.1", "it has 4 columns"),
        ("0 0.5 0.5 0.1 0.1 0.9", "it has 6 columns.*can be a score"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.8 0.7", "it has 8 columns.*kpt_shape"),
    ],
)
def test_invalid_labels_are_refused_with_file_and_line(tmp_path, line, match):
    register_changed(tmp_path, lambda folder: (folder / "labels/train/exact0.txt").write_text(f"\n{line}\n"))
    with pytest.raises(GDetKDError, match=f"exact0.txt', line 2: {match}"):
        DatasetCatalog.get("exact")


def test_a_label_with_keypoints_needs_the_columns_of_kpt_shape(tmp_path):
    register_changed(tmp_path, lambda folder: [pose(folder), each_line(lambda columns: columns[:-1])(folder)])
    with pytest.raises(GDetKDError, match="line 1: it has 10 columns. By kpt_shape of data.yaml a label has 11, or 5"):
        DatasetCatalog.get("exact")


@pytest.mark.parametrize(
    "text, match",
    [
        ("- a", "holds a list, not a dictionary"),
        ("names: [a\n", "ParserError"),
        ("names: !!python/object/apply:os.system [echo]\n", "ConstructorError"),
        ("train: images/train\n", "its names are None"),
        ("train: images/train\nnames: {0: a, 2: b}\n", r"indices of its names are \[0, 2\]"),
        ("train: images/train\nnames: [yes, no]\n", "YAML reads a class name as True: put it in quotes"),
        (f"train: images/train\nnc: 4\n{NAMES}", "nc is 4, but it has 3 names"),
        (f"train: images/train\nkpt_shape: 7\n{NAMES}", "kpt_shape is 7"),
        (f"train: images/train\npath: [a]\n{NAMES}", r"path is \['a'\], not text"),
        (f"train: {{a: b}}\n{NAMES}", "train is .*not a path"),
        (f"val: images/train\n{NAMES}", "no split 'train'; it names val"),
        (f"train: images/nowhere\n{NAMES}", "names 'images/nowhere', which does not exist"),
    ],
)
def test_invalid_descriptions_are_refused(tmp_path, text, match):
    with pytest.raises(GDetKDError, match=match):
        register_changed(tmp_path, yaml(text))


def test_an_exponential_yaml_is_refused_with_a_short_message(tmp_path):
    levels = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
    with pytest.raises(GDetKDError, match="data.yaml") as error:
        register_changed(tmp_path, yaml(f"a0: &a0 [x]\n{levels}train: *a9\nnames: *a9\n"))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        yaml(f"train: ../elsewhere\n{NAMES}"),
        yaml(f"path: ../elsewhere\ntrain: .\n{NAMES}"),
        listed("../elsewhere/{}\n"),
    ],
)
def test_paths_do_not_lead_out_of_the_folder(tmp_path, change):
    def both(folder):
        shutil.copytree(folder / "images/train", folder.parent / "elsewhere")
        for path in (folder / "labels/train").iterdir():
            shutil.copy(path, folder.parent / "elsewhere")
        change(folder)

    with pytest.raises(GDetKDError, match="leads to .*elsewhere.*DATASETS.ALLOW_OUTSIDE to True"):
        register_changed(tmp_path / "yolo", both)
    for part in ("yolo", "elsewhere"):
        shutil.rmtree(tmp_path / part)
    cfg, objects = register_changed(tmp_path / "yolo", both, allow_outside=True)
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)


def test_path_may_start_at_detectron2s_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def change(folder):
        (folder / "lists").mkdir()
        (folder / "lists/data.yaml").write_text(f"path: yolo\ntrain: images/train\n{NAMES}")

    cfg, objects = register_changed(tmp_path / "yolo", change, yaml="lists/data.yaml")
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)


def test_a_path_that_could_mean_two_folders_is_refused(tmp_path):
    def change(folder):
        roboflow(folder)
        shutil.copytree(folder / "train", folder.parent / "train")

    with pytest.raises(GDetKDError, match=r"'../train/images', which could be .* or .*train/images"):
        register_changed(tmp_path / "yolo", change, allow_outside=True)


def test_nc_without_names_and_another_name_of_a_split(tmp_path):
    cfg, _ = register_changed(tmp_path, yaml("valid: images/train\nnc: 3\n"), split="val")
    assert class_names(cfg) == ("class_0", "class_1", "class_2") and len(DatasetCatalog.get("exact")) == COUNT


def test_images_may_be_a_text_file(tmp_path):
    cfg, objects = register_changed(
        tmp_path, listed("images/train/{}\n"), **{**BY_FOLDER, "images": "train.txt"}, classes=CLASSES
    )
    assert ap_of_exact_detections(cfg, objects) == pytest.approx(100.0)


def test_class_names_are_known_without_registering_the_dataset(tmp_path):
    write_yolo(tmp_path)
    entry = {"name": "elsewhere", "kind": "yolo", "yaml": str(tmp_path / "data.yaml"), "split": "train"}
    cfg = make_cfg({"DATASETS.REGISTER": [entry], "DATASETS.TRAIN": ("elsewhere",)})
    assert class_names(cfg) == tuple(CLASSES)


def test_a_dataset_without_any_label_file_is_refused(tmp_path):
    register_changed(tmp_path, lambda folder: shutil.rmtree(folder / "labels"))
    with pytest.raises(GDetKDError, match="None of 6 images .* has a label file"):
        DatasetCatalog.get("exact")


def test_unknown_or_contradictory_classes_are_refused(tmp_path):
    with pytest.raises(GDetKDError, match="classes of .* are not known: there is no classes.txt"):
        register_changed(tmp_path / "none", **BY_FOLDER)

    def two(folder):
        (folder / "classes.txt").write_text("a\nb\n")
        (folder / "images/obj.names").write_text("b\na\n")

    with pytest.raises(GDetKDError, match="obj.names and .*classes.txt list different names"):
        register_changed(tmp_path / "two", two, **{**BY_FOLDER, "images": "images"})


@pytest.mark.parametrize(
    "entry, match",
    [
        ({"split": None}, "lacks the key split"),
        ({"yaml": None}, "lacks the key yaml"),
        ({"classes": CLASSES}, "has the unknown key classes"),
        ({"yaml": "nowhere.yaml"}, "nowhere.yaml.*which does not exist"),
        ({"split": 3}, "has split 3, not text"),
    ],
)
def test_invalid_entries_are_refused(tmp_path, entry, match):
    with pytest.raises(GDetKDError, match=match):
        register_changed(tmp_path, **entry)


def test_bad_images_within_a_limit_are_counted(tmp_path):
    register_changed(tmp_path, lambda folder: (folder / "images/train/exact1.png").write_bytes(b""), limit=4)
    dicts = DatasetCatalog.get("exact")
    assert len(dicts) == 4
    kept, is_kept = without_bad_images(dicts, 0.5, "exact")
    assert is_kept.tolist() == [True, False, True, True] and len(kept) == 3
    with pytest.raises(GDetKDError, match="1 of 4 images cannot be used"):
        without_bad_images(dicts, 0.1, "exact")


def test_a_label_file_of_another_image_is_not_taken_for_its_spelling(tmp_path):
    """A.jpg shows no object, so it has no label file. B.jpg has one that is spelt in another way."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in ("A.jpg", "a.jpg", "B.jpg"):
        (tmp_path / "images" / name).touch()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "labels" / name).touch()
    finder = LabelFinder()
    found = [finder.find(str(tmp_path / "images" / name)) for name in ("A.jpg", "a.jpg", "B.jpg")]
    assert found == [None, str(tmp_path / "labels" / "a.txt"), str(tmp_path / "labels" / "b.txt")]
