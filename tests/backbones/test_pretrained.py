"""Test when a backbone's file of ImageNet weights is read, that it is loaded whole, and which images it expects."""

import logging
import re

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from steps import backbone_keys, tool

from conftest import make_cfg, plain_keys_of
from gdetkd import DistillTrainer
from gdetkd.backbones import add_backbone_config, load_pretrained
from gdetkd.config_file import load_config
from gdetkd.engine import build_plain_student
from gdetkd.engine.check import Check
from gdetkd.engine.student_weights import StudentCheckpointer
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import UntrustedFileError
from gdetkd.teacher import FrozenTeacher

NAME = "mobilenet_v3_small"
PREFIX = "backbone.bottom_up."
FIRST = "features.0.0.weight"
# Torchvision's preprocessing: https://pytorch.org/vision/stable/models.html, times 255.
RIGHT_IMAGES = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
}


@pytest.fixture
def weights(tmp_path):
    """Write a file as torchvision's, with values that no other test has; return its path and tensors."""
    torch.manual_seed(9)
    tensors = torchvision.models.get_model(NAME, weights=None).state_dict()
    torch.save(tensors, tmp_path / "imagenet.pth")
    return tmp_path / "imagenet.pth", tensors


def keys_with(path, **node):
    return backbone_keys("TORCHVISION", NAME, WEIGHTS=str(path), **node)


def run_keys(path, tmp_path, changes={}):
    keys = {"OUTPUT_DIR": str(tmp_path / "run"), "SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 1}
    keys.update({"SOLVER.BASE_LR": 1e-5, **RIGHT_IMAGES})
    (tmp_path / "run").mkdir(exist_ok=True)
    return make_cfg({**keys_with(path), **keys, **changes})


def trained_to_the_end(cfg, resume=False):
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_all_tensors_are_loaded_and_the_classifier_is_named(weights, caplog):
    path, tensors = weights
    model = build_model(make_cfg(keys_with(path)))
    caplog.set_level(logging.INFO, "gdetkd")
    loaded = load_pretrained(model)
    state = model.state_dict()
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    assert loaded == [PREFIX + name for name in backbone]
    assert all(torch.equal(state[PREFIX + name], tensor) for name, tensor in backbone.items())
    assert "Unused: classifier.0.weight, classifier.0.bias, classifier.3.weight, classifier.3.bias." in caplog.text
    assert "RGB, mean (123.675, 116.28, 103.53), std (58.395, 57.12, 57.375)" in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(FIRST), f"MODEL.TORCHVISION.WEIGHTS .* lacks 1 of the 240 tensors .*{FIRST}"),
        (lambda t: t.update({FIRST: t[FIRST][:, :1]}), rf"{FIRST} \(16, 1, 3, 3\) for \(16, 3, 3, 3\)"),
        (lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)], "The tensors of the file are x.feat"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(weights, change, message):
    path, tensors = weights
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(GDetKDError, match=message):
        load_pretrained(build_model(make_cfg(keys_with(path))))


def test_paths_and_files_that_cannot_be_used_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({FIRST: Payload()}, tmp_path / "payload.pth")
    for path, error, message in (
        (tmp_path / "none.pth", GDetKDError, "none.pth' is not there.*docs/backbones.md"),
        ("https://example.com/a.pth", GDetKDError, "must be a file on this machine"),
        (tmp_path / "payload.pth", UntrustedFileError, "refused"),
    ):
        model = build_model(make_cfg(keys_with(path)))
        with pytest.raises(error, match=message):
            load_pretrained(model)
    assert not (tmp_path / "ran").exists()


def test_a_training_starts_from_the_file_and_later_steps_do_not_need_it(weights, tmp_path):
    path, tensors = weights
    cfg = run_keys(path, tmp_path)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert torch.equal(trainer.student.state_dict()[PREFIX + FIRST], tensors[FIRST])
    assert all(not name.startswith(PREFIX) for name in trainer.checkpointer.unloaded)
    trainer.train()
    path.unlink()
    with pytest.raises(GDetKDError, match="imagenet.pth' is not there"):
        DistillTrainer(cfg).resume_or_load(resume=False)
    resumed = trained_to_the_end(run_keys(path, tmp_path, {"SOLVER.MAX_ITER": 3}), resume=True)
    assert resumed.start_iter == 2
    student = build_plain_student(cfg)
    checkpointer = StudentCheckpointer(student)
    checkpointer.load(str(tmp_path / "run" / "model_final.pth"))
    checkpointer.check_whole()
    assert torch.equal(student.state_dict()[PREFIX + FIRST], resumed.student.state_dict()[PREFIX + FIRST])


def test_weights_of_a_detector_replace_the_file(weights, tmp_path, caplog):
    path, tensors = weights
    model = build_model(make_cfg(keys_with(path)))
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    whole = DistillTrainer(run_keys(path, tmp_path, {"MODEL.WEIGHTS": str(tmp_path / "detector.pth")}))
    whole.resume_or_load(resume=False)
    assert torch.equal(whole.student.state_dict()[PREFIX + FIRST], model.state_dict()[PREFIX + FIRST])
    assert whole.checkpointer.pretrained == [] and whole.checkpointer.unloaded == []
    heads = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIX)}
    torch.save({"model": heads}, tmp_path / "heads.pth")
    both = DistillTrainer(run_keys(path, tmp_path, {"MODEL.WEIGHTS": str(tmp_path / "heads.pth")}))
    both.resume_or_load(resume=False)
    assert torch.equal(both.student.state_dict()[PREFIX + FIRST], tensors[FIRST])
    assert both.checkpointer.unloaded == [] and set(heads).isdisjoint(both.checkpointer.pretrained)
    assert "as they were initialised" not in caplog.text


@pytest.mark.parametrize("key, value", [("BACKBONE.FREEZE_AT", 2), ("TORCHVISION.NORM", "FrozenBN"), ("", "")])
def test_a_frozen_part_that_no_file_sets_is_reported(weights, tmp_path, caplog, key, value):
    frozen = {f"MODEL.{key}": value} if key else {}
    path, _ = weights
    DistillTrainer(run_keys(path, tmp_path, frozen)).resume_or_load(resume=False)
    assert "no file sets them" not in caplog.text
    check = Check(run_keys("", tmp_path, frozen))
    check.run()
    assert len(check.problems) == len(frozen)
    if frozen:
        assert re.search(r"\d+ tensors of the student \(backbone.bottom_up.*are frozen, but no file", check.problems[0])
        assert "MODEL.TORCHVISION.WEIGHTS" in check.problems[0]
        trainer = DistillTrainer(run_keys("", tmp_path, frozen))
        trainer.resume_or_load(resume=False)
        assert "no file sets them" in caplog.text


def test_frozen_heads_are_not_reported_because_head_transfer_may_fill_them():
    cfg = make_cfg({})
    model = build_model(cfg)
    model.roi_heads.requires_grad_(False)
    assert StudentCheckpointer(model).start_problems(cfg) == []
    model.backbone.requires_grad_(False)
    assert len(StudentCheckpointer(model).start_problems(cfg)) == 1


def test_the_librarys_file_in_the_place_of_a_detectors_is_explained(weights, tmp_path):
    path, _ = weights
    trainer = DistillTrainer(run_keys("", tmp_path, {"MODEL.WEIGHTS": str(path)}))
    with pytest.raises(GDetKDError, match="fits none.*weights of the backbone belong into MODEL.TORCHVISION.WEIGHTS"):
        trainer.resume_or_load(resume=False)


def test_a_teacher_does_not_need_the_file(distill_cfg, make_teacher, tmp_path):
    teacher = make_teacher(keys_with(tmp_path / "none.pth"))
    assert FrozenTeacher(distill_cfg({**teacher, "DISTILL.LOSSES": ("SGFI", "CKD")})).spec.channels == 8


WRONG_IMAGES = [
    {"INPUT.FORMAT": "BGR"},
    {"MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675]},
    {"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]},
]


@pytest.mark.parametrize("changes", WRONG_IMAGES, ids=lambda changes: next(iter(changes)))
def test_other_images_than_the_weights_expect_are_reported(weights, tmp_path, caplog, changes):
    trainer = DistillTrainer(run_keys(weights[0], tmp_path, changes))
    trainer.resume_or_load(resume=False)
    assert "which expects images in RGB, mean (123.675, 116.28, 103.53), std (58.395" in caplog.text
    assert 'Set INPUT.FORMAT "RGB", MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD' in caplog.text


def test_images_are_not_reported_without_the_file_or_if_they_are_right(weights, tmp_path, caplog):
    DistillTrainer(run_keys(weights[0], tmp_path)).resume_or_load(resume=False)
    rounded = {"MODEL.PIXEL_MEAN": [124.0, 116.0, 104.0]}
    DistillTrainer(run_keys(weights[0], tmp_path, rounded)).resume_or_load(resume=False)
    DistillTrainer(run_keys("", tmp_path, WRONG_IMAGES[0])).resume_or_load(resume=False)
    assert "expects images" not in "".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def test_the_check_shows_the_file_and_compares_the_images(weights, tmp_path):
    sound, wrong = (Check(run_keys(weights[0], tmp_path, changes)) for changes in ({}, WRONG_IMAGES[2]))
    assert f"none, from scratch; backbone: {weights[0]}, 240 tensors." in sound.run() and sound.problems == []
    wrong.run()
    assert len(wrong.problems) == 1 and "expects images in RGB" in wrong.problems[0]


def test_an_exported_config_needs_one_import(weights, tmp_path):
    cfg = make_cfg(keys_with(weights[0], **{"NORM": "FrozenBN"}))
    (tmp_path / "student.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    weights[0].unlink()
    exported = load_config(str(tmp_path / "student.yaml"), [])
    tool.write_plain_config(exported, str(tmp_path / "model_final.pth"), tmp_path / "plain.yaml")
    plain = get_cfg()
    add_backbone_config(plain)
    plain.merge_from_file(str(tmp_path / "plain.yaml"))
    assert "DISTILL" not in plain and plain.MODEL.TORCHVISION.WEIGHTS == "" and "TIMM" not in plain_keys_of(cfg).MODEL
    loaded = build_model(plain)
    DetectionCheckpointer(loaded).load(plain.MODEL.WEIGHTS)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
