"""The losses of other papers, on all pairs of families that they support."""

from itertools import product

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_pairs import build, distillation_terms, step

from conftest import FAMILIES, WIDER, look_through_the_model, make_batch
from gdetkd import DistillTrainer
from gdetkd.errors import GDetKDError

DENSE = ("retinanet", "fcos")
ON_MAPS = ("FITNET", "GTMASK", "ROIFI", "CWD", "PKD", "FGD", "MGD")
PAIRS = ["-".join(pair) for pair in product(FAMILIES, FAMILIES)]
# The tiny towers have one convolution.
SHORT_TOWERS = {"DISTILL.CROSSKD.ANCHOR_BASED.SHARED_CONVS": 1, "DISTILL.CROSSKD.ANCHOR_FREE.SHARED_CONVS": 1}


def defined_on(pair):
    """Return the losses that support a pair "teacher-student"."""
    teacher, student = pair.split("-")
    losses = list(ON_MAPS)
    if student != "fcos":
        losses.append("FGFI")
    if teacher in DENSE and student in DENSE:
        losses.append("CROSSKD")
    return tuple(losses)


def rival_cfg(pair_cfg, pair, losses, changes={}, teacher={}):
    return pair_cfg(pair, {**SHORT_TOWERS, "DISTILL.LOSSES": losses, **changes}, teacher)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_rival_trains_a_step_on_every_pair_that_it_is_defined_on(pair_cfg, pair):
    losses = defined_on(pair)
    model, found = step(rival_cfg(pair_cfg, pair, losses))
    terms = distillation_terms(found)
    assert len(terms) == len(losses)
    assert all(torch.isfinite(term) and term > 0 for term in terms.values()), terms
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "retinanet-retinanet"])
def test_every_rival_alone_sends_a_gradient_to_the_students_backbone(pair_cfg, pair):
    for loss in defined_on(pair):
        model = build(rival_cfg(pair_cfg, pair, (loss,)))
        with EventStorage():
            model(make_batch())[f"loss_distill_{loss.lower()}"].backward()
        gradients = [p.grad for p in model.student.backbone.parameters() if p.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, loss
        assert not [name for name, p in model.losses.named_parameters() if p.grad is None], loss
        assert all(p.grad is None for p in model.teacher.model.parameters()), loss


@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "faster_rcnn-retinanet", "fcos-fcos", "retinanet-fcos"])
def test_without_ground_truth_every_parameter_has_a_gradient(pair_cfg, pair):
    model, losses = step(rival_cfg(pair_cfg, pair, defined_on(pair)), make_batch(boxes_each=0))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_distill_gtmask"] == 0
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "fcos-retinanet"])
def test_half_precision_forward_gives_float32_terms(pair_cfg, pair):
    model = build(rival_cfg(pair_cfg, pair, defined_on(pair)))
    with torch.autocast("cpu", dtype=torch.bfloat16), EventStorage():
        losses = model(make_batch())
    for name, term in distillation_terms(losses).items():
        assert term.dtype == torch.float32 and torch.isfinite(term), name


def test_losses_of_several_papers_together(pair_cfg):
    _, losses = step(rival_cfg(pair_cfg, "retinanet-retinanet", ("SGFI", "PKD", "CKD", "CROSSKD")))
    assert len(distillation_terms(losses)) == 4 and all(torch.isfinite(loss) for loss in losses.values())


def test_a_loss_on_maps_alone_looks_at_no_region(pair_cfg):
    """The teacher runs no RoIAlign and no box head, and the dense student samples no regions."""
    model = build(rival_cfg(pair_cfg, "faster_rcnn-retinanet", ("FITNET", "PKD")))
    heads = model.teacher.model.roi_heads

    def fail(*args):
        raise AssertionError("this was not asked for")

    for module in (heads.box_pooler, heads.box_head, heads.box_predictor):
        module.register_forward_hook(fail)
    model.adapter._find_regions = fail
    state = torch.get_rng_state()
    with EventStorage():
        model(make_batch())
    assert torch.equal(state, torch.get_rng_state())


def test_roifi_needs_no_box_head(pair_cfg):
    model = build(rival_cfg(pair_cfg, "faster_rcnn-faster_rcnn", ("ROIFI",)))

    def fail(*args):
        raise AssertionError("this was not asked for")

    model.teacher.model.roi_heads.box_head.register_forward_hook(fail)
    with EventStorage():
        model(make_batch())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_maps_of_other_padding_are_compared_where_both_are(pair_cfg, side):
    model = build(rival_cfg(pair_cfg, "faster_rcnn-faster_rcnn", (*ON_MAPS, "FGFI")))
    # A backbone with a coarser level pads so, as does a backbone that takes only squares of one size.
    detector = model.student if side == "student" else model.teacher.model
    detector.backbone._size_divisibility = 128
    with EventStorage():
        terms = distillation_terms(model(make_batch(sizes=((40, 72), (33, 57)))))
    assert len(terms) == 8 and all(torch.isfinite(term) and term > 0 for term in terms.values())


def test_levels_that_one_pyramid_lacks_are_named(pair_cfg, caplog):
    fewer = {
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32]],
    }
    model, _ = step(rival_cfg(pair_cfg, "faster_rcnn-faster_rcnn", ("FITNET", "ROIFI"), fewer))
    assert [level.student for level in model.losses["FITNET"].levels] == ["p2", "p3", "p4"]
    assert "FITNET leaves out levels whose stride only one pyramid has: p5 (1/32) of the teacher." in caplog.text
    assert "ROIFI uses the nearest stride in their place: 1/32 to 1/16." in caplog.text


def test_crosskd_has_the_factors_and_the_exponent_of_its_node(pair_cfg):
    def term(**values):
        torch.manual_seed(0)
        keys = {f"DISTILL.CROSSKD.{key.replace('__', '.')}": value for key, value in values.items()}
        _, losses = step(rival_cfg(pair_cfg, "retinanet-retinanet", ("CROSSKD",), keys))
        return losses["loss_distill_crosskd"].item()

    classes = term(ANCHOR_BASED__CLS_WEIGHT=1.0, ANCHOR_BASED__REG_WEIGHT=0.0)
    boxes = term(ANCHOR_BASED__CLS_WEIGHT=0.0, ANCHOR_BASED__REG_WEIGHT=1.0)
    both = term(ANCHOR_BASED__CLS_WEIGHT=2.0, ANCHOR_BASED__REG_WEIGHT=3.0)
    assert both == pytest.approx(2 * classes + 3 * boxes, rel=1e-4) and min(classes, boxes) > 0
    # |difference of scores| is below 1, so a larger exponent gives a smaller loss.
    assert 0 < term(ANCHOR_BASED__CLS_WEIGHT=1.0, ANCHOR_BASED__REG_WEIGHT=0.0, BETA=2.0) < 0.9 * classes


def test_crosskd_compares_where_both_are(pair_cfg):
    model = build(rival_cfg(pair_cfg, "retinanet-retinanet", ("CROSSKD",)))
    model.student.backbone._size_divisibility = 128  # the student pads more than its teacher
    with EventStorage():
        losses = model(make_batch(sizes=((40, 72),)))
    assert torch.isfinite(losses["loss_distill_crosskd"]) and losses["loss_distill_crosskd"] > 0


@pytest.mark.parametrize("family", DENSE)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(pair_cfg, family):
    """A mistake in the levels, their order, the anchors or the cut of the head would show."""
    losses = ("PKD", "CWD", "CROSSKD")
    model = build(rival_cfg(pair_cfg, f"{family}-{family}", losses, WIDER))
    for name, parameter in model.teacher.model.head.named_parameters():
        if name.endswith("weight"):
            parameter.data *= 10  # an untrained head predicts the same for every location
    model.student.load_state_dict(model.teacher.model.state_dict())
    model.double(), model.teacher.model.double()
    look_through_the_model(model.teacher, torch.float64)
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # the teacher's statistics, as the teacher itself uses them
    with EventStorage():
        found = model(make_batch())
    assert found["loss_distill_crosskd"].item() == pytest.approx(0, abs=1e-4)
    assert found["loss_distill_pkd"].item() == pytest.approx(0, abs=1e-5)
    assert found["loss_distill_cwd"].item() == pytest.approx(0, abs=1e-5)
    for parameter in (*model.student.head.cls_subnet[0].parameters(), *model.student.head.bbox_subnet[0].parameters()):
        parameter.data *= 3  # CROSSKD brings the features back to the teacher's scale
    with EventStorage():
        assert model(make_batch())["loss_distill_crosskd"].item() == pytest.approx(0, abs=1e-4)
    model.student.head.cls_subnet[0].weight.data.neg_()
    with EventStorage():
        assert model(make_batch())["loss_distill_crosskd"].item() > 0.01


def test_crosskd_of_heads_with_norms_of_each_level(pair_cfg):
    keys = {"MODEL.RETINANET.NORM": "BN", "MODEL.RETINANET.NUM_CONVS": 2}
    cfg = rival_cfg(pair_cfg, "retinanet-retinanet", ("CROSSKD", "SGFI", "CKD"), {**keys, **WIDER}, keys)
    model = build(cfg)
    positions = [m._pos for m in model.teacher.model.head.modules() if hasattr(m, "_pos")]
    assert positions
    with EventStorage():
        losses = model(make_batch())
    assert torch.isfinite(losses["loss_distill_crosskd"])
    assert positions == [m._pos for m in model.teacher.model.head.modules() if hasattr(m, "_pos")]


REFUSED = [
    ("retinanet-fcos", ("FGFI",), {}, "FGFI.*no anchors on p3.*GTMASK"),
    ("faster_rcnn-retinanet", ("CROSSKD",), {}, "CROSSKD.*teacher is not dense.*DISTILL.LOSSES"),
    ("retinanet-faster_rcnn", ("CROSSKD",), {}, "CROSSKD.*student is not dense.*DISTILL.LOSSES"),
    (
        "retinanet-retinanet",
        ("CROSSKD",),
        {"DISTILL.CROSSKD.ANCHOR_BASED.SHARED_CONVS": 2},
        "ANCHOR_BASED.SHARED_CONVS is 2.*Set it to a value from 0 to 1",
    ),
    ("retinanet-retinanet", ("CROSSKD",), {"MODEL.FPN.OUT_CHANNELS": 12}, "12 channels there and the teacher 8.*FPN"),
    ("faster_rcnn-retinanet", ("PKD",), {"MODEL.FPN.OUT_CHANNELS": 12}, "12 channels.*DISTILL.PKD.ALIGN"),
    ("faster_rcnn-faster_rcnn", ("CWD",), {"DISTILL.CWD.TEMPERATURE": 0.0}, "DISTILL.CWD.TEMPERATURE"),
    ("faster_rcnn-faster_rcnn", ("FGD",), {"DISTILL.FGD.TWO_STAGE.TEMPERATURE": 0.0}, "FGD.TWO_STAGE.TEMPERATURE"),
    ("faster_rcnn-fcos", ("MGD",), {"DISTILL.MGD.ANCHOR_FREE.MASK_RATIO": 1.0}, "MGD.ANCHOR_FREE.MASK_RATIO"),
    ("faster_rcnn-faster_rcnn", ("FGFI",), {"DISTILL.FGFI.IOU_FACTOR": 1.5}, "DISTILL.FGFI.IOU_FACTOR"),
    ("faster_rcnn-faster_rcnn", ("ROIFI",), {"DISTILL.ROIFI.SAMPLING_RATIO": 0}, "DISTILL.ROIFI.SAMPLING_RATIO"),
]


@pytest.mark.parametrize("pair,losses,changes,message", REFUSED)
def test_what_a_rival_is_not_defined_on_is_refused_with_a_remedy(pair_cfg, pair, losses, changes, message):
    with pytest.raises(GDetKDError, match=message):
        build_model(rival_cfg(pair_cfg, pair, losses, changes))


def test_crosskd_of_other_levels_is_refused(pair_cfg):
    fewer = {
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 10, 12], [16, 20, 24], [32, 40, 48], [64, 80, 96]],
    }
    with pytest.raises(GDetKDError, match=r"CROSSKD.*same strides. The student has \[8, 16, 32, 64\] and"):
        build_model(rival_cfg(pair_cfg, "retinanet-retinanet", ("CROSSKD",), fewer))


def test_pyramids_without_a_common_stride_are_refused(pair_cfg):
    high = {"MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"]}
    low = {
        "MODEL.RETINANET.IN_FEATURES": ["p6", "p7"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[64, 80, 96], [128, 160, 192]],
    }
    message = r"FITNET.*student \(p6 1/64, p7 1/128\) and teacher \(p2 1/4, p3 1/8\).*SGFI and CKD"
    with pytest.raises(GDetKDError, match=message):
        build_model(rival_cfg(pair_cfg, "faster_rcnn-retinanet", ("FITNET",), low, high))


def test_pyramids_of_other_widths(pair_cfg):
    changes = {"MODEL.FPN.OUT_CHANNELS": 12, "DISTILL.PKD.ALIGN": True}
    losses = (*ON_MAPS, "FGFI")
    model, found = step(rival_cfg(pair_cfg, "faster_rcnn-faster_rcnn", losses, changes))
    assert len(distillation_terms(found)) == 8 and all(torch.isfinite(loss) for loss in found.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_masks_are_drawn_again_after_a_resume(pair_cfg, tmp_path):
    """MGD draws the same masks in a resumed run as in a run that was not interrupted."""

    def run(folder, *stops):
        for stop in stops:
            changes = {"SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / folder), "SOLVER.CHECKPOINT_PERIOD": 1}
            cfg = rival_cfg(pair_cfg, "faster_rcnn-faster_rcnn", ("MGD", "FGD"), changes)
            (tmp_path / folder).mkdir(exist_ok=True)
            trainer = DistillTrainer(cfg)
            trainer.resume_or_load(resume=True)
            trainer.max_iter = stop
            trainer.train()
        return trainer.student.state_dict()

    whole, resumed = run("whole", 3), run("resumed", 2, 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
