"""Head transfer warns if the copied layers predict boxes in other units or from other anchors in the student."""

import pytest

from conftest import DENSE, make_cfg
from gdetkd.detectors import build_adapter
from gdetkd.engine.class_checks import check_copied_layers, check_transfer
from gdetkd.engine.preflight import check_student
from gdetkd.errors import GDetKDError
from gdetkd.structures import with_class_names
from gdetkd.teacher import FrozenTeacher, transferable

from detectron2.modeling import build_model  # isort: skip

FCOS = {**DENSE, "MODEL.META_ARCHITECTURE": "FCOS"}
SCALED = {**FCOS, "MODEL.FCOS.LEVEL_SCALES": True}
WEIGHTS = {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)}
ANCHORS = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128]]}
MORE_ANCHORS = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16, 20], [32, 40], [64, 80], [128, 160]]}
RETINANET = {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.RETINANET.IN_FEATURES": ["p2", "p3", "p4", "p5"]}
OTHER_CLASSES = {"MODEL.ROI_HEADS.NUM_CLASSES": 5}
AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}


def warn(config, student, teacher):
    """Compare two detectors, as a training with head transfer does."""
    models, specs = [], []
    for changes in (student, teacher):
        cfg = make_cfg(changes)
        models.append(build_model(cfg))
        specs.append(build_adapter(models[-1], "student", cfg).spec)
    check_copied_layers(make_cfg(config), transferable(models[1], models[0]), *specs)


@pytest.mark.parametrize(
    "student, teacher, names",
    [
        (WEIGHTS, {}, "BBOX_REG_WEIGHTS"),
        (ANCHORS, {}, "MODEL.ANCHOR_GENERATOR"),
        ({**WEIGHTS, **ANCHORS}, {}, "BBOX_REG_WEIGHTS and MODEL.ANCHOR_GENERATOR"),
        ({**RETINANET, **ANCHORS}, RETINANET, "MODEL.ANCHOR_GENERATOR"),
        (FCOS, SCALED, "MODEL.FCOS.LEVEL_SCALES"),
        # a box layer without classes is copied, whatever the number of classes
        ({**WEIGHTS, **OTHER_CLASSES, **AGNOSTIC}, AGNOSTIC, "BBOX_REG_WEIGHTS"),
    ],
)
def test_boxes_in_other_units_or_from_other_anchors_are_warned_of(caplog, student, teacher, names):
    warn({}, student, teacher)
    assert f"but {names} of student and teacher differ. So the student's first boxes are wrong" in caplog.text


@pytest.mark.parametrize(
    "student, teacher, config",
    [
        ({}, {}, {}),
        (MORE_ANCHORS, {}, {}),
        ({**WEIGHTS, **OTHER_CLASSES}, {}, {}),
        ({**WEIGHTS, "MODEL.ROI_BOX_HEAD.FC_DIM": 8}, {}, {}),
        ({**ANCHORS, "MODEL.FPN.OUT_CHANNELS": 12}, {}, {}),
        ({**RETINANET, **ANCHORS}, {}, {}),
        (SCALED, FCOS, {}),
        (SCALED, SCALED, {}),
        (ANCHORS, {}, {"DISTILL.TEACHER.SCALE": 2.0}),
    ],
)
def test_layers_that_agree_or_are_not_copied_cause_no_warning(caplog, student, teacher, config):
    warn(config, student, teacher)
    assert "first boxes" not in caplog.text


def test_towers_with_and_without_norms_share_no_layer():
    plain, normed = (
        build_model(make_cfg({**RETINANET, "MODEL.RETINANET.NUM_CONVS": 3, "MODEL.RETINANET.NORM": norm}))
        for norm in ("", "BN")
    )
    assert "head.cls_subnet.0.weight" in transferable(plain, plain)
    copied = transferable(normed, plain)
    assert "head.cls_score.weight" in copied and not any("_subnet." in name for name in copied)


@pytest.mark.parametrize("changes", [{"MODEL.ROI_BOX_HEAD.NUM_FC": 2}, {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1}])
def test_box_heads_of_other_depths_share_no_layer(changes):
    student, teacher = (build_model(make_cfg({"MODEL.ROI_BOX_HEAD.CONV_DIM": 8, **keys})) for keys in ({}, changes))
    assert "roi_heads.box_head.fc1.weight" in transferable(student, student)
    assert not any(".box_head." in name for name in transferable(teacher, student))


def test_anchors_and_classes_whose_product_agrees_are_not_mixed_up():
    student = {**RETINANET, "MODEL.RETINANET.NUM_CLASSES": 6}
    teacher = {**RETINANET, **MORE_ANCHORS, "MODEL.RETINANET.NUM_CLASSES": 3}
    with pytest.raises(GDetKDError, match="would mix up anchors and classes: the student has 6 .* the teacher 3"):
        warn({}, student, teacher)


@pytest.mark.parametrize(
    "student, teacher, moved",
    [
        (("cat", "dog", "bird"), ("cat", "bird", "fish"), "bird"),
        (("cat", "dog", "bird"), ("dog", "cat", "bird"), "cat, dog"),
        (("cat", "dog", "bird"), ("cat", "dog", "fish"), None),
    ],
)
def test_a_class_never_starts_from_another_class_if_the_teacher_has_it(student, teacher, moved, caplog):
    cfg = make_cfg({})
    spec = build_adapter(build_model(cfg), "student", cfg).spec
    specs = (with_class_names(spec, names) for names in (student, teacher))
    if moved is None:
        check_transfer(cfg, *specs)
        assert "from classes of the teacher with other names" in caplog.text
        return
    with pytest.raises(GDetKDError, match=f"would start the student's {moved} from wrong classes"):
        check_transfer(cfg, *specs)


def test_a_training_with_head_transfer_warns(distill_cfg, caplog):
    cfg = distill_cfg({"DISTILL.HEAD_TRANSFER": True, **WEIGHTS, "DISTILL.LOSSES": ()}, teacher={})
    teacher = FrozenTeacher(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    check_student(cfg, build_model(cfg), teacher)
    assert "but BBOX_REG_WEIGHTS of student and teacher differ" in caplog.text
