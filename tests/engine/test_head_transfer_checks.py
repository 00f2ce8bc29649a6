"""Head transfer warns if the copied layers mean something else in the student."""

import pytest

from conftest import make_cfg
from gdetkd.detectors import build_adapter
from gdetkd.engine.class_checks import check_transfer

from detectron2.modeling import build_model  # isort: skip

WEIGHTS = {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)}
ANCHORS = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128]]}
MORE_ANCHORS = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16, 20], [32, 40], [64, 80], [128, 160]]}
RETINANET = {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.RETINANET.IN_FEATURES": ["p2", "p3", "p4", "p5"]}


def spec_of(changes):
    cfg = make_cfg(changes)
    return build_adapter(build_model(cfg), "student", cfg).spec


@pytest.mark.parametrize(
    "student, config, names",
    [
        (WEIGHTS, {}, "BBOX_REG_WEIGHTS"),
        (ANCHORS, {}, "MODEL.ANCHOR_GENERATOR"),
        ({**WEIGHTS, **ANCHORS}, {}, "BBOX_REG_WEIGHTS and MODEL.ANCHOR_GENERATOR"),
        ({}, {}, ""),
        (MORE_ANCHORS, {}, ""),  # the layer has another shape and is not copied
        (ANCHORS, {"DISTILL.TEACHER.SCALE": 2.0}, ""),
    ],
)
def test_boxes_in_other_units_or_from_other_anchors_are_warned_of(caplog, student, config, names):
    check_transfer(make_cfg(config), spec_of(student), spec_of({}))
    expected = f"but {names} of student and teacher differ. So the student's first boxes are wrong"
    assert (expected in caplog.text) if names else ("first boxes" not in caplog.text)


def test_a_number_of_classes_that_differs_does_not_hide_it(caplog):
    check_transfer(make_cfg({}), spec_of({**WEIGHTS, "MODEL.ROI_HEADS.NUM_CLASSES": 3}), spec_of({}))
    assert "BBOX_REG_WEIGHTS of student and teacher differ" in caplog.text


def test_another_family_has_no_layer_in_common(caplog):
    check_transfer(make_cfg({}), spec_of(RETINANET), spec_of(WEIGHTS))
    assert "first boxes" not in caplog.text
