"""Pairs of any two detector families, in both directions."""

from itertools import product

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.utils.events import EventStorage

from conftest import ALL_LOSSES, FAMILIES, WIDER, make_batch
from gdetkd import DistillTrainer
from gdetkd.detectors import FCOS
from gdetkd.engine import evaluate_teacher
from gdetkd.errors import GDetKDError
from gdetkd.structures import Regions
from gdetkd.teacher import transfer_heads


def build(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for detector in (model.student, model.teacher.model):
        if isinstance(detector, FCOS):  # the boxes of an untrained FCOS have no area
            torch.nn.init.ones_(detector.head.bbox_pred.bias)
    return model


def step(cfg, batch=None):
    model = build(cfg)
    with EventStorage():
        losses = model(make_batch() if batch is None else batch)
    sum(losses.values()).backward(retain_graph=True)
    return model, losses


def distillation_terms(losses):
    return {name: loss for name, loss in losses.items() if "distill" in name}


def assert_each_reaches_the_backbone(model, terms):
    weights = list(model.student.backbone.parameters())
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients), name


@pytest.mark.parametrize("pair", ["-".join(pair) for pair in product(FAMILIES, FAMILIES)])
def test_every_pair_learns_from_regions(pair_cfg, pair):
    model, losses = step(pair_cfg(pair))
    terms = distillation_terms(losses)
    assert len(terms) == 2 and all(torch.isfinite(term) and term > 0 for term in terms.values())
    assert_each_reaches_the_backbone(model, terms)
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("pair", ["faster_rcnn-retinanet", "faster_rcnn-fcos", "retinanet-faster_rcnn", "fcos-fcos"])
def test_without_ground_truth_every_parameter_has_a_gradient(pair_cfg, pair):
    model, losses = step(pair_cfg(pair), make_batch(boxes_each=0))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_an_untrained_student_whose_boxes_have_no_area_has_no_region(pair_cfg):
    model = build_model(pair_cfg("faster_rcnn-fcos")).train()
    with EventStorage():
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert all(term == 0 for term in distillation_terms(losses).values())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("pair", ["faster_rcnn-retinanet", "retinanet-faster_rcnn", "cascade_rcnn-fcos"])
@pytest.mark.parametrize("loss", ["CLS", "REG"])
def test_predictions_are_not_compared_across_dense_and_two_stage(pair_cfg, pair, loss):
    with pytest.raises(GDetKDError, match=f"{loss}.*dense.*DISTILL.LOSSES"):
        build_model(pair_cfg(pair, {"DISTILL.LOSSES": ("SGFI", loss)}))


def test_dense_predictions_from_other_anchors_are_not_compared(pair_cfg):
    with pytest.raises(GDetKDError, match="CLS.*student has 1 at stride 8.*teacher 9 at stride 8"):
        build_model(pair_cfg("retinanet-fcos", {"DISTILL.LOSSES": ("CLS",)}))


@pytest.mark.parametrize("family", ["retinanet", "fcos", "cascade_rcnn"])
def test_one_family_has_all_terms_and_head_transfer(pair_cfg, family):
    cfg = pair_cfg(f"{family}-{family}", {"DISTILL.LOSSES": ALL_LOSSES})
    model, losses = step(cfg)
    terms = distillation_terms(losses)
    assert len(terms) == 4 and all(torch.isfinite(term) and term > 0 for term in terms.values())
    assert any(name.startswith(("head.", "roi_heads.")) for name in transfer_heads(model.teacher.model, model.student))


@pytest.mark.parametrize("family", ["retinanet", "fcos", "cascade_rcnn", "faster_rcnn"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_its_predictions(pair_cfg, family):
    """Both detectors predict for the same boxes, so a mistake in an order or an index would show."""
    cfg = pair_cfg(f"{family}-{family}", {"DISTILL.LOSSES": ("CLS", "REG"), **WIDER})
    model = build(cfg)
    model.student.load_state_dict(model.teacher.model.state_dict())
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # the teacher's statistics, as the teacher itself uses them
    with EventStorage():
        losses = model(make_batch())
    assert losses["loss_distill_reg"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_distill_cls"] > 0  # the teacher's own entropy, which is the minimum
    head = model.student.head if family in ("retinanet", "fcos") else model.student.roi_heads
    weight = next(weight for name, weight in head.named_parameters() if name.endswith("cls_score.weight"))
    (gradient,) = torch.autograd.grad(losses["loss_distill_cls"], weight)
    assert gradient.abs().max() < (1e-7 if family in ("retinanet", "fcos") else 1e-4)


def test_cascade_compares_each_stage_that_both_have(pair_cfg):
    teach = lambda pair: distillation_terms(step(pair_cfg(pair, {"DISTILL.LOSSES": ("CLS",)}))[1])  # noqa: E731
    one_stage, three_stages = teach("faster_rcnn-cascade_rcnn"), teach("cascade_rcnn-cascade_rcnn")
    # An untrained detector is undecided, so a stage adds about log(4).
    assert 1.0 < one_stage["loss_distill_cls"] < 2.0 and 3.5 < three_stages["loss_distill_cls"] < 5.5


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn"])
def test_a_two_stage_teacher_computes_what_is_asked_for_alone(pair_cfg, family):
    teacher = build(pair_cfg(f"{family}-faster_rcnn")).teacher
    regions = Regions([inputs["instances"].gt_boxes for inputs in make_batch()])
    fields = ("levels", "embeddings", "logits")
    for asked in fields:
        outputs = teacher.look(make_batch(), regions, {asked}, [regions])
        assert {field for field in fields if getattr(outputs, field) is not None} <= {asked, "embeddings"}
        assert getattr(outputs, asked) is not None
        assert bool(outputs.later_stages) == (asked == "logits" and family == "cascade_rcnn")


@pytest.mark.parametrize("student, regions", [("faster_rcnn", 8), ("cascade_rcnn", 8), ("retinanet", 6), ("fcos", 6)])
def test_ckds_queue_holds_the_regions_of_so_many_steps(pair_cfg, student, regions):
    keys = {"DISTILL.CKD.QUEUE_SIZE": -1, "DISTILL.CKD.QUEUE_STEPS": 3, "DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE": 6}
    model = build(pair_cfg(f"faster_rcnn-{student}", keys))
    assert model.adapter.spec.regions_per_image == regions
    queue = model.losses["CKD"].queue
    assert len(queue.embeddings) == 3 * 2 * regions  # 2 images a step
    with EventStorage():
        model(make_batch())
    assert 0 < len(queue.contents()) <= 2 * regions


def test_later_stages_in_other_units_are_refused(pair_cfg):
    weights = {"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[10.0, 10, 5, 5], [20.0, 20, 10, 10], [9.0, 9, 9, 9]]}
    with pytest.raises(GDetKDError, match="9.0.*at stage 3"):
        build_model(pair_cfg("cascade_rcnn-cascade_rcnn", {"DISTILL.LOSSES": ("REG",), **weights}))


@pytest.mark.parametrize("pair", ["faster_rcnn-retinanet", "fcos-faster_rcnn"])
def test_a_pair_trains_and_its_checkpoint_is_the_plain_students(pair_cfg, pair, tmp_path):
    cfg = pair_cfg(pair, {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ("tiny",), "DISTILL.WARMUP_ITERS": 2})
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert list(saved) == list(trainer.student.state_dict())


NORMS = {
    "GN": {"MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 32},
    "ResNeXt": {"MODEL.RESNETS.NUM_GROUPS": 2},
    "R101": {"MODEL.RESNETS.DEPTH": 101},
    "head norm": {"MODEL.FPN.OUT_CHANNELS": 32, "MODEL.FCOS.NORM": "GN", "MODEL.RETINANET.NORM": "BN"},
}


@pytest.mark.parametrize("changes", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("pair", ["retinanet-faster_rcnn", "faster_rcnn-fcos", "retinanet-retinanet"])
def test_other_backbones_norms_widths_and_strides(pair_cfg, pair, changes):
    for keys in ({"changes": changes}, {"teacher": changes}):
        _, losses = step(pair_cfg(pair, **keys))
        assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.fixture
def regnet():
    """Register a builder for Detectron2's RegNet, which a yaml config cannot name otherwise."""

    def build_tiny_regnet_fpn_backbone(cfg, input_shape):
        stages = RegNet(
            stem_class=SimpleStem,
            stem_width=8,
            block_class=ResBottleneckBlock,
            depth=6,
            w_a=8.0,
            w_0=8,
            w_m=2.0,
            group_width=4,
            norm="BN",
            out_features=["s1", "s2"],
        )
        return FPN(stages, ["s1", "s2"], cfg.MODEL.FPN.OUT_CHANNELS)

    BACKBONE_REGISTRY.register(build_tiny_regnet_fpn_backbone)
    levels = ["p2", "p3"]
    return {
        "MODEL.BACKBONE.NAME": "build_tiny_regnet_fpn_backbone",
        "MODEL.ROI_HEADS.IN_FEATURES": levels,
        "MODEL.RPN.IN_FEATURES": levels,
        "MODEL.RETINANET.IN_FEATURES": levels,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]],
    }


@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "retinanet-faster_rcnn", "faster_rcnn-retinanet"])
def test_regnet_and_another_number_of_levels(pair_cfg, pair, regnet):
    for keys in ({"changes": regnet}, {"teacher": regnet}, {"changes": regnet, "teacher": regnet}):
        _, losses = step(pair_cfg(pair, **keys))
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_evaluating_a_teacher_of_other_classes_is_refused(pair_cfg):
    cfg = pair_cfg("fcos-faster_rcnn", {"DATASETS.TEST": ("tiny",)}, teacher={"MODEL.FCOS.NUM_CLASSES": 5})
    with pytest.raises(GDetKDError, match="3 classes and the teacher 5.*EVAL_TEACHER"):
        evaluate_teacher(cfg)
