"""Box heads with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE, a key of Detectron2's main branch.

CLS and REG leave out the background column, which no loss trains. v0.6 has no such heads. There the tests set the
attribute of the predictors that main sets.
"""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage

from conftest import CASCADE, DENSE, NUM_CLASSES, WIDER, make_batch, make_cfg
from gdetkd.detectors import build_adapter
from gdetkd.engine.class_checks import check_transfer
from gdetkd.errors import GDetKDError
from gdetkd.losses import CLS, REG, probability_weighted_localization, soft_binary_classification
from gdetkd.recorder import Recorder
from gdetkd.structures import Regions, with_class_names
from gdetkd.teacher import transfer_heads

HAS_KEY = "USE_SIGMOID_CE" in get_cfg().MODEL.ROI_BOX_HEAD
SIGMOID = {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}
needs_key = pytest.mark.skipif(not HAS_KEY, reason="v0.6 has no MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE")
FAMILIES = pytest.mark.parametrize("family", [{}, CASCADE], ids=["faster_rcnn", "cascade_rcnn"])


@pytest.fixture
def sigmoid_everywhere(monkeypatch):
    """Give all box heads a sigmoid. Return the config keys that do so."""
    if HAS_KEY:
        return SIGMOID
    monkeypatch.setattr(FastRCNNOutputLayers, "use_sigmoid_ce", True, raising=False)
    return {}


def build(changes, role, sigmoid):
    cfg = make_cfg(changes)
    model = build_model(cfg)
    predictors = model.roi_heads.box_predictor
    for predictor in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:
        predictor.use_sigmoid_ce = sigmoid
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return model, build_adapter(model, role, cfg)


def observe(changes, sigmoid=True):
    model, adapter = build(changes, "student", sigmoid)
    batch = make_batch()
    with Recorder(adapter.points()) as calls, EventStorage():
        model.train()(batch)
    return calls, adapter.observe(calls, batch)


def stages_of(outputs):
    return [outputs, *outputs.later_stages]


@FAMILIES
def test_a_sigmoid_student_shows_its_foreground_classes_alone(family):
    calls, outputs = observe(family)
    for k, stage in enumerate(stages_of(outputs)):
        logits, deltas = calls[f"predictor{k}"][0].output
        assert logits.shape[1] == NUM_CLASSES + 1
        assert torch.equal(stage.logits, logits[:, :NUM_CLASSES]) and torch.equal(stage.deltas, deltas)
    assert len(outputs.later_stages) == (2 if family else 0)


@FAMILIES
def test_a_sigmoid_teacher_shows_its_foreground_classes_alone(family):
    model, adapter = build({**WIDER, **family}, "teacher", True)
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    regions = Regions([inputs["instances"].gt_boxes for inputs in make_batch()])
    later = [regions, regions] if family else []
    with Recorder(adapter.points()) as calls, torch.no_grad():
        outputs = adapter.look(adapter.extract(images), regions, {"logits", "deltas"}, later)
    assert len(stages_of(outputs)) == 1 + len(later)
    for k, stage in enumerate(stages_of(outputs)):
        logits, deltas = calls[f"predictor{k}"][0].output
        assert logits.shape[1] == NUM_CLASSES + 1
        assert torch.equal(stage.logits, logits[:, :NUM_CLASSES]) and torch.equal(stage.deltas, deltas)


@FAMILIES
def test_the_spec_says_how_classes_are_scored(family):
    for sigmoid in (True, False):
        assert build(family, "student", sigmoid)[1].spec.independent_classes is sigmoid
    for dense in ("RetinaNet", "FCOS"):
        cfg = make_cfg({**DENSE, "MODEL.META_ARCHITECTURE": dense})
        assert build_adapter(build_model(cfg), "student", cfg).spec.independent_classes


def test_stages_of_both_kinds_are_refused():
    cfg = make_cfg(CASCADE)
    model = build_model(cfg)
    model.roi_heads.box_predictor[1].use_sigmoid_ce = True
    model.roi_heads.box_predictor[0].use_sigmoid_ce = model.roi_heads.box_predictor[2].use_sigmoid_ce = False
    with pytest.raises(GDetKDError, match="stages of the student's cascade.*sigmoid.*softmax.*all stages the same"):
        build_adapter(model, "student", cfg)


def losses_for(student_sigmoid, teacher_sigmoid, names=("class0", "class1", "class2"), family={}):
    """Return CLS (None if it is refused), REG, and the outputs of student and teacher on the same regions."""
    student_model, student = build(family, "student", student_sigmoid)
    teacher_keys = {**WIDER, **family, "MODEL.ROI_HEADS.NUM_CLASSES": len(names)}
    teacher = build(teacher_keys, "teacher", teacher_sigmoid)[1]
    cfg, batch = make_cfg({}), make_batch()
    with Recorder(student.points()) as calls, EventStorage():
        student_model.train()(batch)
    student_outputs = student.observe(calls, batch)
    later = [stage.regions for stage in student_outputs.later_stages]
    with torch.no_grad():
        features = teacher.extract(torch.randn(2, 3, 64, 64))
        teacher_outputs = teacher.look(features, student_outputs.regions, {"logits", "deltas"}, later)
    specs = with_class_names(student.spec, ("class0", "class1", "class2")), with_class_names(teacher.spec, names)
    cls = CLS(cfg, *specs) if student_sigmoid == teacher_sigmoid else None
    return cls, REG(cfg, *specs), student_outputs, teacher_outputs


@FAMILIES
def test_two_sigmoid_heads_are_compared_class_by_class(family):
    cls, reg, student_outputs, teacher_outputs = losses_for(True, True, family=family)
    pairs = list(zip(stages_of(student_outputs), stages_of(teacher_outputs)))
    expected = sum(soft_binary_classification(a.logits, b.logits) for a, b in pairs)
    torch.testing.assert_close(cls.compute(student_outputs, teacher_outputs), expected)
    expected = sum(probability_weighted_localization(a.deltas, b.deltas, b.logits.sigmoid()) for a, b in pairs)
    torch.testing.assert_close(reg.compute(student_outputs, teacher_outputs), expected)
    assert len(pairs) == (3 if family else 1) and expected > 0


@pytest.mark.parametrize("student, teacher", [(True, False), (False, True)])
def test_reg_weights_by_the_teachers_own_probabilities(student, teacher):
    _, reg, student_outputs, teacher_outputs = losses_for(student, teacher)
    logits = teacher_outputs.logits
    probabilities = logits.sigmoid() if teacher else logits.softmax(dim=1)[:, :-1]
    assert probabilities.shape[1] == NUM_CLASSES
    expected = 0.0
    for i in range(len(logits)):
        for d in range(4):
            gaps = [
                float(teacher_outputs.deltas[i, 4 * c + d] - student_outputs.deltas[i, 4 * c + d])
                for c in range(NUM_CLASSES)
            ]
            expected += abs(sum(float(p) * gap for p, gap in zip(probabilities[i], gaps))) / len(logits)
    assert reg.compute(student_outputs, teacher_outputs).item() == pytest.approx(expected, rel=1e-4)


def test_common_classes_of_sigmoid_heads_are_selected_and_not_merged():
    cls, reg, student_outputs, teacher_outputs = losses_for(True, True, names=("class2", "other", "class0", "more"))
    assert cls.classes.student == (0, 2) and cls.classes.teacher == (2, 0)
    expected = soft_binary_classification(student_outputs.logits[:, [0, 2]], teacher_outputs.logits[:, [2, 0]])
    torch.testing.assert_close(cls.compute(student_outputs, teacher_outputs), expected)
    a = student_outputs.deltas.unflatten(1, (-1, 4))[:, [0, 2]]
    b = teacher_outputs.deltas.unflatten(1, (-1, 4))[:, [2, 0]]
    expected = (teacher_outputs.logits[:, [2, 0], None].sigmoid() * (b - a)).sum(dim=1).abs().sum(dim=1).mean()
    torch.testing.assert_close(reg.compute(student_outputs, teacher_outputs), expected)


@pytest.mark.parametrize("student, teacher", [(True, False), (False, True)])
def test_cls_between_sigmoid_and_softmax_is_refused(student, teacher):
    specs = build({}, "student", student)[1].spec, build(WIDER, "teacher", teacher)[1].spec
    kinds = {True: "a sigmoid", False: "a softmax"}
    message = f"student has {kinds[student]}.*teacher {kinds[teacher]}.*USE_SIGMOID_CE.*DISTILL.LOSSES"
    with pytest.raises(GDetKDError, match=message):
        CLS(make_cfg({}), *specs)
    REG(make_cfg({}), *specs)


def test_head_transfer_between_sigmoid_and_softmax_warns(caplog):
    specs = [build({}, "student", sigmoid)[1].spec for sigmoid in (True, False)]
    check_transfer(make_cfg({}), *specs)
    assert (
        "layer with a sigmoid, and head transfer starts it from a layer that was trained with a softmax" in caplog.text
    )
    caplog.clear()
    check_transfer(make_cfg({}), specs[0], specs[0])
    assert "trained with" not in caplog.text


@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "cascade_rcnn-cascade_rcnn", "faster_rcnn-cascade_rcnn"])
def test_a_sigmoid_pair_has_all_terms(pair_cfg, sigmoid_everywhere, pair):
    keys = sigmoid_everywhere
    model = build_model(pair_cfg(pair, {"DISTILL.LOSSES": ("SGFI", "CKD", "CLS", "REG"), **keys}, teacher=keys)).train()
    assert model.losses["CLS"].independent and model.losses["REG"].independent
    with EventStorage():
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_distill_cls"] > 0
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn"])
def test_a_sigmoid_student_equal_to_its_teacher_is_at_the_least_of_cls(pair_cfg, sigmoid_everywhere, family):
    """CLS has a zero gradient, also in the background column, and REG is zero."""
    keys = {**WIDER, **sigmoid_everywhere}
    cfg = pair_cfg(f"{family}-{family}", {"DISTILL.LOSSES": ("CLS", "REG"), **keys}, teacher=keys)
    model = build_model(cfg).train()
    model.student.load_state_dict(model.teacher.model.state_dict())
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    with EventStorage():
        losses = model(make_batch())
    predictors = model.student.roi_heads.box_predictor
    predictor = predictors[0] if isinstance(predictors, torch.nn.ModuleList) else predictors
    (gradient,) = torch.autograd.grad(losses["loss_distill_cls"], predictor.cls_score.weight)
    assert gradient.abs().max() < 1e-5 and gradient[-1].eq(0).all()
    assert losses["loss_distill_reg"].item() == pytest.approx(0, abs=1e-5)


@needs_key
def test_the_key_of_the_student_alone_counts_for_the_student_alone(pair_cfg):
    with pytest.raises(GDetKDError, match="student has a sigmoid.*teacher a softmax"):
        build_model(pair_cfg("faster_rcnn-faster_rcnn", {"DISTILL.LOSSES": ("CLS",), **SIGMOID}))
    model = build_model(pair_cfg("faster_rcnn-faster_rcnn", {"DISTILL.LOSSES": ("REG",)}, teacher=SIGMOID))
    assert model.losses["REG"].independent


@needs_key
@pytest.mark.parametrize("pair", ["faster_rcnn-faster_rcnn", "cascade_rcnn-cascade_rcnn"])
def test_a_pair_with_the_federated_loss(pair_cfg, monkeypatch, pair):
    """Head transfer leaves the class frequencies alone, because they belong to a detector's own dataset."""
    metadata = MetadataCatalog.get("tiny")
    counts = [{"id": c + 1, "image_count": 4 + c} for c in range(NUM_CLASSES)]
    monkeypatch.setitem(metadata.__dict__, "class_image_count", counts)
    keys = {**SIGMOID, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": True, "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 2}
    model = build_model(pair_cfg(pair, {"DISTILL.LOSSES": ("SGFI", "CKD", "CLS", "REG"), **keys}, teacher=keys)).train()
    with EventStorage():
        losses = model(make_batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    frequencies = {n: b for n, b in model.student.named_buffers() if n.endswith("fed_loss_cls_weights")}
    for buffer in frequencies.values():
        buffer.fill_(7)
    copied = transfer_heads(model.teacher.model, model.student)
    assert copied and frequencies and not set(copied) & set(frequencies)
    assert all(buffer.eq(7).all() for buffer in frequencies.values())
