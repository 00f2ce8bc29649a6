"""Test the labels of teachers: the tool, its determinism, and runs that are killed."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from scenes import Scene

from conftest import WIDER, write_coco
from gdetkd.errors import GDetKDError
from gdetkd.labelling import detect
from gdetkd.labelling.images import find_in_folder, read_images
from gdetkd.labelling.part import Part
from gdetkd.labelling.run import Options, label_images
from gdetkd.labelling.source import Detections
from gdetkd.teacher import FrozenTeacher
from programs import ROOT, run_program
from test_lazy_teacher import lazy_teacher  # noqa: F401  a fixture
from test_torchvision_teachers import teacher_keys  # noqa: F401  a fixture

# Rounding differs with the number of threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
FIVE = {**WIDER, "MODEL.ROI_HEADS.NUM_CLASSES": 5}


def tool(config_file, scene, output, *more, environment={}):
    arguments = ["--config-file", config_file, "--images", scene.images, "--output", output, *more]
    return run_program(ROOT / "tools" / "label.py", *arguments, environment={**ENVIRONMENT, **environment})


def in_two_processes(config_file, scene, output, *more):
    """Run the tool in two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: tool(config_file, scene, output, *more, environment=rank), ranks))


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


@pytest.fixture
def options(scene):
    return lambda **changes: Options(**{"output": scene.output, "images": str(scene.images), **changes})


def test_the_tool_writes_the_same_in_one_and_in_two_processes(distill_cfg, scene, tmp_path):
    config_file = tmp_path / "distill.yaml"
    config_file.write_text(distill_cfg(scene.keys).dump())
    alone = tool(config_file, scene, tmp_path / "alone.json")
    assert alone.returncode == 0, alone.stderr
    for result in in_two_processes(config_file, scene, tmp_path / "together.json"):
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "alone.json").read_bytes() == (tmp_path / "together.json").read_bytes()
    assert (tmp_path / "alone.html").read_bytes() == (tmp_path / "together.html").read_bytes()
    described = json.loads((tmp_path / "alone.json").read_text())["info"]["gdetkd_labels"]
    assert described["source"] == "teacher" and described["chosen_on"] == "val"
    assert described["teacher"]["weights"].endswith("teacher.pth") and len(described["teacher"]["sha256"]) == 64
    assert 0 < described["thresholds"]["class0"]["f1"] < 1 and "class0" in alone.stdout

    refused = tool(config_file, scene, tmp_path / "more.json", "--thresholds", "class0")
    assert refused.returncode == 1 and "Write CLASS=SCORE" in refused.stderr.splitlines()[-1]


def test_boxes_are_those_of_the_teacher_in_pixels_of_the_file(distill_cfg, scene, options):
    cfg = distill_cfg(scene.keys)
    label_images(cfg, options(min_score=0.3, floor=0.0))
    teacher = FrozenTeacher(cfg)
    written = scene.read()
    [image] = [item for item in written["images"] if item["file_name"] == "new6.png"]
    pixels = read_as_tensor(scene.images / "new6.png")
    with torch.no_grad():
        [output] = teacher.model([{"image": pixels, "height": 64, "width": 80}])
    boxes = output["instances"].pred_boxes.tensor
    scores = sorted((round(score, 5) for score in output["instances"].scores.tolist()), reverse=True)
    own = [item for item in written["annotations"] if item["image_id"] == image["id"]]
    assert [item["score"] for item in own] == pytest.approx(scores, abs=2e-5) and len(own) == len(boxes) > 5
    best = boxes[output["instances"].scores.argmax()].tolist()
    x, y, width, height = own[0]["bbox"]
    assert (x, y, x + width, y + height) == pytest.approx(best, abs=0.011)


def read_as_tensor(path):
    return torch.as_tensor(read_image(str(path), "BGR").transpose(2, 0, 1).copy())


@pytest.mark.parametrize("kind", ["lazy_teacher", "teacher_keys"])
def test_teachers_of_lazy_files_and_of_torchvision(distill_cfg, scene, options, request, kind):
    make = request.getfixturevalue(kind)
    keys = make() if kind == "lazy_teacher" else make("tiny_fasterrcnn")[1]
    label_images(distill_cfg({**scene.keys, **keys}), options(min_score=0.1))
    written = scene.read()
    assert len(written["images"]) == 8 and len(written["annotations"]) > 8
    teacher = written["info"]["gdetkd_labels"]["teacher"]
    assert teacher["config_file"] == keys["DISTILL.TEACHER.CONFIG_FILE"]


def test_a_teacher_without_class_names_needs_as_many_classes(distill_cfg, scene, options, caplog):
    nobodys = {"DATASETS.TRAIN": ("nobody",)}
    label_images(distill_cfg(scene.keys, {**WIDER, **nobodys}), options(min_score=0.1))
    assert "Labelling assumes that student and teacher have the same classes" in caplog.text
    with pytest.raises(GDetKDError, match="names are unknown, and it has 5 classes but the student 3"):
        label_images(distill_cfg(scene.keys, {**FIVE, **nobodys}), options(min_score=0.1))
    names = {"DISTILL.TEACHER.CLASSES": ("a", "class2", "b", "class0", "c")}
    label_images(distill_cfg({**scene.keys, **names}, {**FIVE, **nobodys}), options(min_score=0.1))
    written = scene.read()
    assert {item["category_id"] for item in written["annotations"]} == {1, 3}
    assert " 0 boxes" not in written["info"]["description"]


class Killed(Exception):
    """Stand for a kill."""


def kill_after(monkeypatch, count):
    """Let the run end when it has found the boxes of some more images."""
    original, calls = detect.as_found, []

    def as_found(*arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(detect, "as_found", as_found)
    return calls


def test_a_killed_run_continues_and_writes_the_same(distill_cfg, scene, options, monkeypatch):
    cfg = distill_cfg(scene.keys)
    label_images(cfg, options())
    whole = scene.output.read_bytes()
    scene.output.unlink()
    for count in (2, 9):  # in the validation set of 6 images, then among the 8 images
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, count)
            label_images(cfg, options())
        assert not scene.output.exists()
    torn = scene.part / "labels-0.jsonl"
    assert len(torn.read_text().splitlines()) == 5
    (scene.part / "labels-1.jsonl").write_text(torn.read_text()[:-30])  # as if a second process had been killed
    torn.unlink()
    calls = kill_after(monkeypatch, 100)
    label_images(cfg, options())
    assert len(calls) == 4 and scene.output.read_bytes() == whole and not scene.part.exists()


def test_an_image_that_changed_meanwhile_is_labelled_again(distill_cfg, scene, options, monkeypatch):
    cfg = distill_cfg(scene.keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        label_images(cfg, options(min_score=0.1))
    Image.new("RGB", (64, 64)).save(scene.images / "new1.png")
    calls = kill_after(monkeypatch, 100)
    label_images(cfg, options(min_score=0.1))
    assert [call[0].name for call in calls[:1]] == ["new1.png"] and len(calls) == 4


def test_another_teacher_or_other_settings_do_not_continue(distill_cfg, scene, options, monkeypatch, make_teacher):
    cfg = distill_cfg(scene.keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 9)
        label_images(cfg, options())
    with pytest.raises(
        GDetKDError, match=r"other settings \(--floor\).* Delete that folder, or choose another --output"
    ):
        label_images(cfg, options(floor=0.1))
    make_teacher(seed=8)
    with pytest.raises(GDetKDError, match="other settings .teacher's SHA-256"):
        label_images(cfg, options())
    changed = distill_cfg({**scene.keys, "DISTILL.TEACHER.OPTS": ["INPUT.MIN_SIZE_TEST", 80]})
    with pytest.raises(GDetKDError, match="SHA-256 of the teacher's config"):
        label_images(changed, options())


def test_another_number_of_boxes_in_the_teachers_file_does_not_continue(distill_cfg, scene, options, monkeypatch):
    cfg = distill_cfg(scene.keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 9)
        label_images(cfg, options())
    path = Path(cfg.DISTILL.TEACHER.CONFIG_FILE)
    content = yaml.safe_load(path.read_text())
    content.setdefault("TEST", {})["DETECTIONS_PER_IMAGE"] = 300
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(GDetKDError, match="other settings .teacher's TEST.DETECTIONS_PER_IMAGE"):
        label_images(cfg, options())


def test_a_process_that_is_killed_loses_no_image(distill_cfg, scene, tmp_path):
    write_coco(scene.images, 150, "more", seed=3)
    (scene.images / "more.json").unlink()
    config_file = tmp_path / "distill.yaml"
    config_file.write_text(distill_cfg(scene.keys).dump())
    with ThreadPoolExecutor(1) as pool:
        before = set(active_children())
        running = pool.submit(tool, config_file, scene, scene.output, "--min-score", "0.1")
        lines, end = scene.part / "labels-0.jsonl", time.monotonic() + 120
        while not lines.exists() or lines.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < end and not running.done(), "the run was not caught"
            time.sleep(0.002)
        [process] = set(active_children()) - before
        process.kill()
        assert running.result().returncode == -signal.SIGKILL
    known = lines.read_bytes().count(b"\n")
    assert 5 <= known < 150 and not scene.output.exists()
    result = tool(config_file, scene, scene.output, "--min-score", "0.1")
    assert result.returncode == 0, result.stderr
    assert f"0/{158 - known}" in result.stderr  # the progress bar starts with the images that are left
    assert len(scene.read()["images"]) == 158


@pytest.mark.parametrize("kind", ["images", "coco", "registered by the user"])
def test_images_of_a_registered_dataset(distill_cfg, scene, kind):
    entry = {"name": "new", "kind": kind, "images": str(scene.images)}
    if kind == "coco":
        entry["json"] = str(scene.annotations)
    changes = {**scene.keys}
    if kind in ("images", "coco"):
        changes["DATASETS.REGISTER"] = [*scene.keys["DATASETS.REGISTER"], entry]
    else:
        files = sorted(scene.images.rglob("*.png"))
        DatasetCatalog.register("new", lambda: [{"file_name": str(path)} for path in files])
    label_images(distill_cfg(changes), Options(scene.output, dataset="new", min_score=0.1))
    names = [image["file_name"] for image in scene.read()["images"]]
    assert names == sorted(path.relative_to(scene.images).as_posix() for path in scene.images.rglob("*.png"))


def test_an_outdated_line_of_another_process_is_not_taken(scene, tmp_path):
    """An image that changed between two runs has two lines, in the files of two processes."""

    class Everywhere:
        def detect(self, images):
            for image in images:
                yield image, Detections(torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([0.9]), torch.tensor([0]))

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    images, _ = read_images(find_in_folder(str(tmp_path)))
    part = Part(tmp_path / "out.json", {})
    [image] = [image for image in images if image.name == "a.png"]
    outdated = {
        "name": "a.png",
        "bytes": image.bytes,
        "sha256": "0",
        "boxes": [],
        "scores": [],
        "classes": [],
        "dropped": 0,
    }
    (part.folder / "labels-1.jsonl").write_text(json.dumps(outdated) + "\n")
    found = detect.detect_all(Everywhere(), [image], part, "labels", detect.Kept(0.05, [0]))
    assert found["a.png"].scores == [0.9] and found["a.png"].sha256 != "0"
    again = detect.detect_all(Everywhere(), [image], part, "labels", detect.Kept(0.05, [0]))
    assert again == found
