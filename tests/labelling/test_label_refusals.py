"""Test images and options that are refused or left out, before the long run where that is possible."""

import logging
import shutil

import pytest
from PIL import Image
from scenes import Scene, results_of

from conftest import make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.labelling.run import Options, label_images


def refused(scene, message, changes={}, **options):
    with pytest.raises(GDetKDError, match=message):
        label_images(make_cfg({**scene.keys, **changes}), scene.perfect(**options))
    assert not scene.output.exists()


def test_a_folder_without_images(tmp_path):
    scene = Scene(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    refused(scene, "has no image .* It has 1 .txt", images=str(tmp_path / "empty"))
    refused(scene, "is not a folder", images=str(tmp_path / "nowhere"))


def test_unreadable_images_are_left_out_counted_and_named(tmp_path, caplog):
    scene = Scene(tmp_path)
    (scene.images / "new0.png").write_bytes(b"no image")
    for index in (1, 2, 4):  # torn: the header is whole
        content = (scene.images / f"new{index}.png").read_bytes()
        (scene.images / f"new{index}.png").write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING, "gdetkd"):
        label_images(make_cfg(scene.keys), scene.perfect())
    written = scene.read()
    assert written["info"]["gdetkd_labels"]["unreadable"] == 4 and len(written["images"]) == 4
    assert "4 images cannot be read" in caplog.text and "new0.png does not open" in caplog.text
    assert "and 1 more" in caplog.text


def test_no_readable_image(tmp_path):
    scene = Scene(tmp_path)
    for path in scene.images.rglob("*.png"):
        path.write_bytes(b"no image")
    refused(scene, "No image in .* can be read")


def test_images_that_measure_the_student_are_refused(tmp_path):
    scene = Scene(tmp_path)
    shutil.copy(tmp_path / "val" / "val2.png", scene.images / "new5.png")
    refused(scene, "1 of the 8 images are also in val, which measures the student: new5.png")
    refused(scene, "are also in val", min_score=0.5)
    # Also a dataset that only chooses the thresholds.
    refused(scene, "are also in val", {"DATASETS.TEST": ()}, validation="val")


def test_an_image_of_the_same_size_in_bytes_with_other_content_is_kept(tmp_path):
    scene = Scene(tmp_path)
    colors = [(1, 2, 3), (3, 2, 1)]
    for path, color in zip([tmp_path / "val" / "val1.png", scene.images / "new1.png"], colors):
        Image.new("RGB", (64, 64), color).save(path.with_suffix(".bmp"))
        path.with_suffix(".bmp").replace(path)
    label_images(make_cfg(scene.keys), scene.perfect(min_score=0.5))
    assert len(scene.read()["images"]) == 8


def test_images_of_the_training_set_are_left_out_and_counted(tmp_path, tiny_dataset):
    scene = Scene(tmp_path)
    for index in (0, 6):
        shutil.copy(tiny_dataset / f"tiny{index}.png", scene.images / f"new{index}.png")
    label_images(make_cfg(scene.keys), scene.perfect())
    written = scene.read()
    assert written["info"]["gdetkd_labels"]["left_out"] == 2
    assert len(written["images"]) == 6 and "new6.png" not in {image["file_name"] for image in written["images"]}


def test_a_dataset_that_is_the_training_set_is_refused(tmp_path):
    scene = Scene(tmp_path)
    options = Options(scene.output, dataset="tiny", min_score=0.5)
    with pytest.raises(GDetKDError, match="All 12 images are in DATASETS.TRAIN"):
        label_images(make_cfg(scene.keys), options)


def test_no_box_above_the_threshold(tmp_path):
    scene = Scene(tmp_path)
    refused(scene, "The highest score is 0.9. Nothing is written", min_score=0.95)
    assert scene.part.exists() and not list(scene.output.parent.glob("*.html"))
    label_images(make_cfg(scene.keys), scene.perfect(min_score=0.5))  # the part is used
    assert len(scene.read()["images"]) == 8


def test_the_boxes_stay_if_the_thresholds_cannot_be_chosen(tmp_path, monkeypatch):
    scene = Scene(tmp_path)
    weak = scene.write("weak.json", results_of(scene.content, score=0.2))
    refused(scene, "Nothing is written", results=weak)  # 0.9 is chosen on the validation set
    monkeypatch.setattr("gdetkd.labelling.detect.as_found", None)  # no image is labelled again
    label_images(make_cfg(scene.keys), scene.perfect(results=weak, validation_results="", min_score=0.1))
    assert len(scene.read()["images"]) == 8


def test_corrected_results_of_the_validation_set_are_read_again(tmp_path):
    scene = Scene(tmp_path)
    wrong = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "score": 0.9}]
    refused(scene, "No box on 'val' is right", validation_results=scene.write("wrong.json", wrong))
    label_images(make_cfg(scene.keys), scene.perfect())
    assert scene.read()["info"]["gdetkd_labels"]["thresholds"]["class0"]["precision"] == 1


@pytest.mark.parametrize("content", ['{"images": [], "annotations": [], "categories": []}', "no JSON", "[]"])
def test_labels_of_people_are_not_overwritten(tmp_path, content):
    scene = Scene(tmp_path)
    labels = tmp_path / "labels.json"
    labels.write_text(content)
    with pytest.raises(GDetKDError, match="--output .*labels.json' exists, and tools/label.py did not write it"):
        label_images(make_cfg(scene.keys), scene.perfect(output=labels))
    assert labels.read_text() == content


def test_an_output_that_cannot_be_written(tmp_path):
    scene = Scene(tmp_path)
    (tmp_path / "file").touch()
    options = scene.perfect(output=tmp_path / "file" / "pseudo.json")
    with pytest.raises(GDetKDError, match="--output .* cannot be written"):
        label_images(make_cfg({**scene.keys, "DATASETS.TRAIN": ("no such dataset",)}), options)  # it comes first
    (tmp_path / "folder.json").mkdir()
    for name, message in (("folder.json", "it is a folder"), ("pseudo.html", "Name a file that ends in .json")):
        with pytest.raises(GDetKDError, match=message):
            label_images(make_cfg(scene.keys), scene.perfect(output=tmp_path / name))


def test_thresholds_that_cannot_be(tmp_path):
    scene = Scene(tmp_path)
    refused(scene, "The threshold 0.01 is not between --floor", min_score=0.01)
    refused(scene, "The threshold 1.5 is not between", min_score=1.5)
    refused(scene, "The threshold 1 is not between .* no box has a score of 1", min_score=1.0)
    refused(scene, "--floor is 2", floor=2)
    refused(scene, "--thresholds names bird", thresholds={"bird": 0.5})
    refused(scene, "DATASETS.TEST is empty. Name a dataset with --validation", {"DATASETS.TEST": ()})
    refused(scene, "The dataset 'nothing' is not registered", validation="nothing")
    refused(scene, "--page-images is 0", page_images=0)


def test_a_validation_set_that_cannot_be_used(tmp_path):
    scene = Scene(tmp_path)
    scene.write("val/val.json", {**scene.validation, "annotations": []})
    refused(scene, "'val': it has no object of the student's classes")
    scene.write("val/val.json", scene.validation)
    (tmp_path / "val" / "val1.png").write_bytes(b"no image")
    refused(scene, "1 of its 6 images cannot be used .*val1.png does not open")


def test_wrong_boxes_choose_no_threshold(tmp_path):
    scene = Scene(tmp_path)
    wrong = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "score": 0.9}]
    refused(scene, "No box on 'val' is right", validation_results=scene.write("wrong.json", wrong))


def test_two_sources_or_none(tmp_path):
    scene = Scene(tmp_path)
    refused(scene, "either with --images FOLDER or with --dataset NAME", dataset="val")
    refused(scene, "DATASETS.TRAIN is", {"DATASETS.TRAIN": ()})
