"""Problems with a teacher are reported before training, with a remedy."""

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from conftest import RESNET_C4, WIDER, make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.teacher import CompleteCheckpointer, FrozenTeacher, transfer_heads


def refused(cfg, match):
    with pytest.raises(GDetKDError, match=match) as error:
        build_model(cfg)
    assert str(error.value).endswith((".", "?", ")"))


def test_config_file_missing(distill_cfg):
    refused(distill_cfg({"DISTILL.TEACHER.CONFIG_FILE": "nowhere.yaml"}), "nowhere.yaml.*DISTILL.TEACHER.CONFIG_FILE")
    refused(distill_cfg({"DISTILL.TEACHER.CONFIG_FILE": ""}), "DISTILL.TEACHER.CONFIG_FILE is empty")


def test_weights_not_given_missing_or_empty(distill_cfg, tmp_path):
    refused(distill_cfg({"DISTILL.TEACHER.WEIGHTS": ""}), "no weights. Set DISTILL.TEACHER.WEIGHTS")
    refused(distill_cfg({"DISTILL.TEACHER.WEIGHTS": "nowhere.pth"}), "nowhere.pth.*are not there")
    (tmp_path / "empty.pth").touch()
    refused(distill_cfg({"DISTILL.TEACHER.WEIGHTS": str(tmp_path / "empty.pth")}), "an empty file")


def test_weights_that_cannot_be_downloaded(distill_cfg, monkeypatch):
    def fail(path, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(PathManager, "get_local_path", fail)
    cfg = distill_cfg({"DISTILL.TEACHER.WEIGHTS": "https://nowhere.example/teacher.pth"})
    refused(cfg, "nowhere.example/teacher.pth' cannot be downloaded .*no route to host.*DISTILL.TEACHER.WEIGHTS")


def test_weights_whose_error_has_no_text(distill_cfg, monkeypatch):
    def fail(self, path):
        raise ValueError

    monkeypatch.setattr(CompleteCheckpointer, "load", fail)
    refused(distill_cfg(), "teacher.pth' cannot be read .ValueError: no details")


def test_weights_truncated_or_no_checkpoint(distill_cfg, tmp_path):
    cfg = distill_cfg()
    data = (tmp_path / "teacher.pth").read_bytes()
    for name, content in {
        "half.pth": data[: len(data) // 2],
        "text.pth": b"<html>404</html>",
        "text.pkl": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
        cfg.DISTILL.TEACHER.WEIGHTS = str(tmp_path / name)
        refused(cfg, f"{name}.*cannot be read.*complete")


def test_weights_that_leave_keys_unloaded(distill_cfg, tmp_path):
    cfg = distill_cfg()
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    del weights["model"]["roi_heads.box_predictor.cls_score.weight"]
    torch.save(weights, tmp_path / "teacher.pth")
    refused(cfg, "1 of .* tensors unloaded .roi_heads.box_predictor.cls_score.weight.*same detector")


def test_weights_of_another_shape(distill_cfg):
    refused(
        distill_cfg({"DISTILL.TEACHER.OPTS": ["MODEL.ROI_HEADS.NUM_CLASSES", 5]}),
        "cls_score.weight .*unloaded|unloaded .*cls_score.weight",
    )


def test_weights_with_more_than_asked_for_only_warn(distill_cfg, caplog):
    """A Faster R-CNN teacher gets the weights of a Mask R-CNN."""
    cfg = distill_cfg({"DISTILL.TEACHER.OPTS": ["MODEL.MASK_ON", False]}, teacher={**WIDER, "MODEL.MASK_ON": True})
    build_model(cfg)
    assert "mask_head" in caplog.text


def test_weights_in_the_model_zoos_format(distill_cfg, tmp_path):
    cfg = distill_cfg()
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    path = tmp_path / "teacher.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    cfg.DISTILL.TEACHER.WEIGHTS = str(path)
    teacher = FrozenTeacher(cfg)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.model.state_dict().items())


def test_teacher_or_student_without_pyramid(distill_cfg):
    refused(distill_cfg(teacher={**WIDER, **RESNET_C4}), "The teacher has no FPN")
    refused(distill_cfg({**RESNET_C4}), "The student has no FPN")


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"MODEL.ROI_HEADS.NAME": "PointRendROIHeads"},
            ".* MODEL.ROI_HEADS.NAME is 'PointRendROIHeads'",
        ),
        (
            {"MODEL.RPN.IN_FEATURES": ["p2", "p8"]},
            "has invalid values: .* names p8, .* needs 1 list or 2 lists",
        ),
        ({"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}, "asks for precomputed proposals"),
        ({"MODEL.LOAD_PROPOSALS": True}, "asks for precomputed proposals"),
    ],
)
def test_a_teachers_config_is_checked_as_the_students(distill_cfg, changes, match):
    cfg = distill_cfg()
    words = [word for key, value in changes.items() for word in (key, str(value))]
    cfg.DISTILL.TEACHER.OPTS = [*cfg.DISTILL.TEACHER.OPTS, *words]
    refused(cfg, f"The teacher's config '.*yaml' {match}")


def test_rotated_boxes_are_refused(distill_cfg):
    rotated = {
        "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
        "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
        "MODEL.ANCHOR_GENERATOR.ANGLES": [[0.0]],
        "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0,) * 5,
        "MODEL.ROI_HEADS.NAME": "RROIHeads",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0, 1.0),
    }
    refused(distill_cfg(teacher={**WIDER, **rotated}), "The teacher is a .*rotated boxes have none")
    refused(distill_cfg({**rotated, "DISTILL.HEAD_TRANSFER": False}), "The student is a .*rotated boxes have none")


def test_unknown_or_repeated_loss(distill_cfg):
    refused(distill_cfg({"DISTILL.LOSSES": ("SGFI", "SGFY")}), "'SGFY'.*CKD")
    refused(distill_cfg({"DISTILL.LOSSES": ("SGFI", "SGFI")}), "twice")


def test_other_number_of_classes(distill_cfg):
    other = {**WIDER, "MODEL.ROI_HEADS.NUM_CLASSES": 5}
    refused(distill_cfg(teacher=other), "3 classes and the teacher 5")
    build_model(distill_cfg({"DISTILL.LOSSES": ("SGFI", "CKD")}, teacher=other))  # these losses need no common class


def test_unequal_regression_weights(distill_cfg):
    weights = {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)}
    refused(distill_cfg(teacher={**WIDER, **weights}), "BBOX_REG_WEIGHTS")


def test_channel_orders_that_cannot_be_converted(distill_cfg):
    refused(distill_cfg({"INPUT.FORMAT": "YUV-BT.601"}), "INPUT.FORMAT")


def test_a_distilled_student_can_teach(distill_cfg, tmp_path):
    cfg = distill_cfg()
    (tmp_path / "student.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).student.state_dict()}, tmp_path / "student.pth")
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(tmp_path / "student.yaml")
    cfg.DISTILL.TEACHER.WEIGHTS = str(tmp_path / "student.pth")
    assert type(FrozenTeacher(cfg).model).__name__ == "GeneralizedRCNN"


def test_head_transfer_copies_what_agrees_and_names_what_does_not(caplog):
    teacher, student = build_model(make_cfg(WIDER)), build_model(make_cfg({"MODEL.ROI_HEADS.NUM_CLASSES": 5}))
    before = student.roi_heads.box_predictor.cls_score.weight.clone()
    copied = transfer_heads(teacher, student)
    assert torch.equal(student.roi_heads.box_head.fc1.weight, teacher.roi_heads.box_head.fc1.weight)
    assert torch.equal(student.roi_heads.box_predictor.cls_score.weight, before)
    assert not any(name.startswith("backbone") for name in copied)
    assert "cls_score" in caplog.text


def test_head_transfer_that_would_transfer_nothing():
    teacher = build_model(make_cfg(WIDER))
    keys = {"MODEL.FPN.OUT_CHANNELS": 12, "MODEL.ROI_BOX_HEAD.FC_DIM": 20, "MODEL.ROI_HEADS.NUM_CLASSES": 5}
    student = build_model(make_cfg({**keys, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]]}))
    with pytest.raises(GDetKDError, match="transfer nothing"):
        transfer_heads(teacher, student)


def test_weights_that_were_trained_on_another_order_of_classes_are_refused(distill_cfg):
    cfg = distill_cfg({"DISTILL.TEACHER.CLASSES": ["class0", "class1", "class2"]})
    weights = torch.load(cfg.DISTILL.TEACHER.WEIGHTS)
    torch.save({**weights, "run": {"classes": ["class2", "class1", "class0"]}}, cfg.DISTILL.TEACHER.WEIGHTS)
    refused(cfg, "weights were trained on the classes class2, class1, class0, but DISTILL.TEACHER.CLASSES.*class0")


@pytest.mark.parametrize(
    "trained, expected",
    [
        (["a", "b", "c"], ("a", "b", "c")),
        (["Class0", "CLASS1", "class2"], ("class0", "class1", "class2")),  # as the student spells them
        (["a", "b"], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("dataset", ["elsewhere", "of_five"])
def test_weights_name_the_classes_if_nothing_else_does(distill_cfg, trained, expected, dataset):
    entry = {"name": "of_five", "kind": "voc", "root": "five", "classes": list("vwxyz")}  # of another detector
    cfg = distill_cfg(teacher={**WIDER, "DATASETS.TRAIN": (dataset,), "DATASETS.REGISTER": [entry]})
    weights = torch.load(cfg.DISTILL.TEACHER.WEIGHTS)
    torch.save({**weights, "run": {"classes": trained}}, cfg.DISTILL.TEACHER.WEIGHTS)
    assert FrozenTeacher(cfg).spec.class_names == expected


@pytest.mark.parametrize("names", [[0, 1, 2], ["yes", False, "maybe"]])
def test_class_names_that_are_no_text_are_refused(distill_cfg, names):
    refused(distill_cfg({"DISTILL.TEACHER.CLASSES": names}), "TEACHER.CLASSES is .*, not a list of texts. Put numbers")


def test_weights_that_were_trained_with_other_settings_cause_a_warning(distill_cfg, caplog):
    cfg = distill_cfg()
    weights, config = torch.load(cfg.DISTILL.TEACHER.WEIGHTS), Path(cfg.DISTILL.TEACHER.CONFIG_FILE).read_text()
    torch.save({**weights, "run": {"config": config}}, cfg.DISTILL.TEACHER.WEIGHTS)
    FrozenTeacher(cfg)
    assert "other settings" not in caplog.text
    cfg.DISTILL.TEACHER.OPTS = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [1.0, 2.0, 3.0]]
    FrozenTeacher(cfg)
    assert "with other settings: INPUT.FORMAT was 'BGR' and is now 'RGB'; MODEL.PIXEL_STD was [" in caplog.text


@pytest.mark.parametrize("extra", [{"run": {"config": {"lr": 1}}}, {"run": {"config": "text"}}, {"settings": [1]}])
def test_weights_of_a_program_with_other_records_are_loaded(distill_cfg, extra):
    cfg = distill_cfg()
    torch.save({**torch.load(cfg.DISTILL.TEACHER.WEIGHTS), **extra}, cfg.DISTILL.TEACHER.WEIGHTS)
    assert FrozenTeacher(cfg).spec.num_classes == 3
