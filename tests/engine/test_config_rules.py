"""An error names invalid values before anything is built."""

import sys

import pytest

from conftest import DENSE
from gdetkd import DistillTrainer
from gdetkd.engine.config_rules import RULES, check_parts, check_values
from gdetkd.errors import GDetKDError

RETINANET = {**DENSE, "DISTILL.STUDENT_META_ARCHITECTURE": "RetinaNet"}


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.IMS_PER_BATCH", 0),
        ("SOLVER.MAX_ITER", 0),
        ("SOLVER.CHECKPOINT_PERIOD", 0),
        ("SOLVER.BASE_LR", 0.0),
        ("SOLVER.GAMMA", -0.1),
        ("DISTILL.TEACHER.CACHE_MB", -1),
        ("DISTILL.TEACHER.SCALE", 0.0),
        ("DISTILL.UNLABELED.FRACTION", 1.0),
        ("DISTILL.UNLABELED.WEIGHT", -0.5),
        ("SOLVER.STEPS", (3, 2)),
        ("SOLVER.WARMUP_ITERS", -1),
        ("SOLVER.WEIGHT_DECAY", -0.1),
        ("SOLVER.WARMUP_METHOD", "cosine"),
        ("TEST.EVAL_PERIOD", -2),
        ("TEST.PATIENCE", -1),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("TEST.COCO_EVAL", "pycocotool"),
        ("LOG.WRITERS", ("tensorboard",)),
        ("LOG.PROJECT", ""),
        ("DATALOADER.NUM_WORKERS", -1),
        ("INPUT.MIN_SIZE_TRAIN", (64, -1)),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "random"),
        ("INPUT.RANDOM_FLIP", "both"),
        ("INPUT.MAX_SIZE_TRAIN", 0),
        ("INPUT.MIN_SIZE_TEST", -1),
        ("INPUT.MAX_SIZE_TEST", 0),
        ("INPUT.MAX_BAD_FRACTION", 2.0),
        ("DISTILL.UNTIL", 0.0),
        ("DISTILL.WEIGHTS", "learned"),
        ("DISTILL.AUTO.PERIOD", 0),
        ("DISTILL.AUTO.MOMENTUM", 1.0),
        ("DISTILL.CKD.SHARE", -1.0),
        ("DISTILL.WARMUP_ITERS", -1),
        ("DISTILL.SKIP_NONFINITE", -1),
        ("DISTILL.CKD.WEIGHT", -0.5),
        ("DISTILL.CKD.WEIGHT", float("nan")),
    ],
)
def test_an_invalid_value_is_refused(distill_cfg, key, value):
    with pytest.raises(GDetKDError, match=f"invalid values: {key} is .* and must be"):
        DistillTrainer(distill_cfg({key: value}))


def test_every_rule_has_an_invalid_value_above():
    names = {key for mark in test_an_invalid_value_is_refused.pytestmark for key, _ in mark.args[1]}
    assert names >= {rule.key for rule in RULES}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p7"]},
            "MODEL.ROI_HEADS.IN_FEATURES names p7, but the pyramid has only p2, p3",
        ),
        (
            {"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]},
            "SIZES has 2 lists, but needs 1 list or 4 lists, one for each level in MODEL.RPN",
        ),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]] * 3}, "ASPECT_RATIOS has 3 lists"),
        (
            {**RETINANET, "MODEL.RETINANET.IN_FEATURES": ["p2", "p3"]},
            "MODEL.RETINANET.IN_FEATURES names p2",
        ),
        (
            {**DENSE, "DISTILL.STUDENT_META_ARCHITECTURE": "FCOS", "MODEL.FCOS.IN_FEATURES": ["p8"]},
            "MODEL.FCOS.IN_FEATURES names p8.*or start from configs/COCO-Detection/Base-FCOS.yaml",
        ),
        (
            {**DENSE, "DISTILL.STUDENT_META_ARCHITECTURE": "FCOS", "TEST.DETECTIONS_PER_IMAGE": -1},
            "DETECTIONS_PER_IMAGE is -1, which makes a FCOS leave out a detection",
        ),
        (
            {"DISTILL.HEAD_TRANSFER": True, "DISTILL.TEACHER.CONFIG_FILE": "torchvision:fasterrcnn_resnet50_fpn"},
            "HEAD_TRANSFER is True, but the classes of a torchvision teacher",
        ),
        (
            DENSE,  # the pyramid of a RetinaNet, in a file that forgets to say so
            "MODEL.ROI_HEADS.IN_FEATURES names p2, .* or set DISTILL.STUDENT_META_ARCHITECTURE if the student is a",
        ),
    ],
)
def test_levels_and_anchors_that_do_not_fit_are_refused(distill_cfg, changes, message):
    with pytest.raises(GDetKDError, match=message):
        DistillTrainer(distill_cfg(changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"MODEL.BACKBONE.NAME": "build_resnet_fpn"},
            "BACKBONE.NAME is 'build_resnet_fpn', .* build_resnet_fpn_backbone",
        ),
        ({"DISTILL.STUDENT_META_ARCHITECTURE": "RetinaNte"}, "STUDENT_META_ARCHITECTURE is 'RetinaNte', .* RetinaNet"),
        ({"MODEL.META_ARCHITECTURE": "GDetKd"}, "MODEL.META_ARCHITECTURE is 'GDetKd', .* mean GDetKD"),
        ({"MODEL.ROI_HEADS.NAME": "StandardRoiHeads"}, "MODEL.ROI_HEADS.NAME .* mean StandardROIHeads"),
        ({"MODEL.PROPOSAL_GENERATOR.NAME": "rpn"}, "PROPOSAL_GENERATOR.NAME is 'rpn', .* RPN"),
        *(
            ({key: "PrecomputedProposals"}, f"{key} is 'PrecomputedProposals', which is not registered")
            for key in ("DISTILL.STUDENT_META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.ROI_HEADS.NAME")
        ),
        ({"TEST.COCO_EVAL": "faster-coco-eval"}, "TEST.COCO_EVAL .* cannot be imported .* pip install"),
        ({"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED is True.*set it to False"),
        ({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}, "DEFORM_ON_PER_STAGE .*compiled"),
        ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIalign"}, "POOLER_TYPE is 'ROIalign' and must be one of ROIAlign, "),
        (
            {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False},
            "CLS_AGNOSTIC_BBOX_REG is False, but a Cascade R-CNN .* set it to True",
        ),
        ({**RETINANET, "MODEL.RETINANET.NUM_CONVS": 0}, "RETINANET.NUM_CONVS is 0 and must be 1 or more"),
        ({**RETINANET, "MODEL.RETINANET.NORM": "GN"}, "RETINANET.NORM is 'GN', .* cannot build"),
        (
            {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "random"},
            "CROP.TYPE is 'random' and must be one of",
        ),
        (
            {"INPUT.MIN_SIZE_TRAIN": (32, 48, 64), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
            'SAMPLING is "range", but INPUT.MIN_SIZE_TRAIN has 3 sizes',
        ),
        (
            {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model"},
            "CLIP_TYPE is 'full_model'. Set it to 'value' or 'norm'",
        ),
        (
            {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals", "DISTILL.INSIGHT.PERIOD": 5},
            "INSIGHT.PERIOD needs a student that finds its own proposals",
        ),
    ],
)
def test_unknown_or_missing_parts_are_refused(distill_cfg, monkeypatch, changes, message):
    monkeypatch.setattr("gdetkd.detector_config.has_compiled_ops", lambda: False)
    monkeypatch.setattr("gdetkd.detector_config.retinanet_takes_group_norm", lambda: False)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(GDetKDError, match=message):
        DistillTrainer(distill_cfg(changes))


@pytest.mark.parametrize("changes", [{"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model"}, {"INPUT.CROP.TYPE": "random"}])
def test_values_of_what_is_off_do_not_matter(distill_cfg, changes):
    DistillTrainer(distill_cfg(changes))


def test_one_error_names_all_invalid_values(distill_cfg):
    with pytest.raises(GDetKDError, match="IMS_PER_BATCH is 0.*MAX_ITER is 0"):
        check_values(distill_cfg({"SOLVER.IMS_PER_BATCH": 0, "SOLVER.MAX_ITER": 0}))


def test_one_list_of_anchors_serves_all_levels(distill_cfg):
    check_values(distill_cfg({"MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16]]}))
    check_values(distill_cfg({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [0.5, 1.0, 2.0]}))


@pytest.mark.parametrize(
    "changes",
    [
        {"TEST.EVAL_PERIOD": -1, "TEST.DETECTIONS_PER_IMAGE": -1},
        {"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals", "MODEL.RPN.IN_FEATURES": ["res4"]},
        {"MODEL.ANCHOR_GENERATOR.NAME": "OwnGenerator", "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]},
        {
            "MODEL.BACKBONE.NAME": "build_resnet_backbone",
            "MODEL.RPN.IN_FEATURES": ["res4"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16]],
        },
        {"INPUT.MIN_SIZE_TEST": 0, "SOLVER.STEPS": (30, 40), "SOLVER.MAX_ITER": 20},
    ],
)
def test_values_that_detectron2_accepts_are_accepted(distill_cfg, changes):
    check_values(distill_cfg(changes))


def test_an_evaluation_checks_parts_but_not_values_of_training(distill_cfg):
    with pytest.raises(GDetKDError, match="TEST.AUG.ENABLED"):
        check_parts(distill_cfg({"TEST.AUG.ENABLED": True}))
    check_parts(distill_cfg({"SOLVER.MAX_ITER": 0}))
