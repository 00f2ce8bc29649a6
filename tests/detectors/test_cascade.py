"""A student that is a Cascade R-CNN gets the whole gradient of a term that reads its first stage alone.

Detectron2 divides the gradient from each of the three stages into the pooled features by 3.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import cascade_rcnn
from detectron2.utils.events import EventStorage

from conftest import make_batch
from gdetkd.recorder import Recorder

STAGES = 3
TERMS = {"CKD": ("embeddings",), "CLS": ("logits",), "REG": ("logits", "deltas")}
HEAD_NORM = {"MODEL.ROI_BOX_HEAD.NORM": "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 8}


def build(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for predictor in model.student.roi_heads.box_predictor:  # so that the deltas have some size
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return model


def observe(model, batch):
    """Run one step of the student. Return the recorded calls, the student's own losses and the adapter's outputs."""
    with Recorder(model.adapter.points()) as calls, EventStorage():
        losses = model.student(batch)
    return calls, losses, model.adapter.observe(calls, batch)


def gradients(model, calls, loss):
    """Return the gradients, or None, in the pyramid and in the first stage's head and predictor."""
    heads = model.student.roi_heads
    maps = list(calls["pooler"][0].inputs[0])
    parameters = [*heads.box_head[0].parameters(), *heads.box_predictor[0].parameters()]
    return torch.autograd.grad(loss, maps + parameters, retain_graph=True, allow_unused=True)


def run_plainly(model, calls, outputs):
    """Compute the fields of the first stage from the pyramid, without Detectron2's division of the gradient."""
    heads, maps = model.student.roi_heads, list(calls["pooler"][0].inputs[0])
    pooled = heads.box_pooler(maps, outputs.regions.boxes)
    head = heads.box_head[0](pooled)
    outputs.embeddings = head.flatten(1)
    outputs.logits, outputs.deltas = heads.box_predictor[0](head)


@pytest.mark.parametrize("changes", [{}, HEAD_NORM], ids=["plain head", "norm in the head"])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_first_stage_sends_its_whole_gradient(pair_cfg, term, changes):
    model = build(pair_cfg("faster_rcnn-cascade_rcnn", {"DISTILL.LOSSES": (term,), **changes}))
    batch = make_batch()
    calls, _, outputs = observe(model, batch)
    teacher = model.teacher.look(batch, outputs.regions, TERMS[term])
    found = gradients(model, calls, model.losses[term].compute(outputs, teacher))
    run_plainly(model, calls, outputs)
    expected = gradients(model, calls, model.losses[term].compute(outputs, teacher))
    # At least one level of the pyramid, and the weight and bias of the head, have a gradient.
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in expected) >= 3
    for gradient, plain in zip(found, expected):
        assert (gradient is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-7)


def test_the_values_are_those_of_the_students_own_pass(pair_cfg):
    model = build(pair_cfg("faster_rcnn-cascade_rcnn", {"DISTILL.LOSSES": ("CKD", "CLS", "REG"), **HEAD_NORM}))
    calls, _, outputs = observe(model, make_batch())
    logits, deltas = calls["predictor0"][0].output
    assert torch.equal(outputs.embeddings, calls["head"][0].output.flatten(1))
    assert torch.equal(outputs.logits, logits) and torch.equal(outputs.deltas, deltas)
    assert outputs.logits.grad_fn is not logits.grad_fn  # computed anew


def test_under_a_cascade_teacher_each_stage_sends_its_share(pair_cfg, monkeypatch):
    """CLS sums three stages, so a stage sends a third into the features, as in the student's own losses."""
    batch, found = make_batch(), {}
    for scaled in (True, False):
        if not scaled:
            monkeypatch.setattr(cascade_rcnn._ScaleGradient, "apply", lambda features, scale: features)
        model = build(pair_cfg("cascade_rcnn-cascade_rcnn", {"DISTILL.LOSSES": ("CLS", "CKD")}))
        assert model.adapter.stages_compared == STAGES
        calls, _, outputs = observe(model, batch)
        teacher = model.teacher.look(
            batch, outputs.regions, {"embeddings", "logits"}, [stage.regions for stage in outputs.later_stages]
        )
        maps = list(calls["pooler"][0].inputs[0])
        for term in ("CLS", "CKD"):
            loss = model.losses[term].compute(outputs, teacher)
            found[term, scaled] = torch.autograd.grad(loss, maps, retain_graph=True)
        assert outputs.logits is calls["predictor0"][0].output[0]  # the recorded one
    for with_scale, without in zip(found["CLS", True], found["CLS", False]):
        torch.testing.assert_close(STAGES * with_scale, without, rtol=1e-4, atol=1e-8)
    for with_scale, without in zip(found["CKD", True], found["CKD", False]):
        torch.testing.assert_close(with_scale, without, rtol=1e-4, atol=1e-8)


def test_running_statistics_count_the_batch_once(pair_cfg):
    model = build(pair_cfg("faster_rcnn-cascade_rcnn", {"DISTILL.LOSSES": ("CKD", "CLS"), **HEAD_NORM}))
    batch = make_batch()
    with Recorder(model.adapter.points()) as calls, EventStorage():
        losses = model.student(batch)
    head = model.student.roi_heads.box_head[0]
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    own = dict(head.named_buffers())
    outputs = model.adapter.observe(calls, batch)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in head.named_buffers())
    assert all(buffer is own[name] for name, buffer in head.named_buffers())
    (sum(losses.values()) + outputs.embeddings.sum()).backward()  # fails if a tensor that it reads was changed


@pytest.mark.parametrize("losses, calls", [(("SGFI",), 1), (("CKD",), 2), (("SGFI", "CLS", "REG"), 2)])
def test_the_first_stage_runs_again_only_where_a_loss_needs_it(pair_cfg, losses, calls):
    model, runs = build(pair_cfg("faster_rcnn-cascade_rcnn", {"DISTILL.LOSSES": losses})), []
    model.student.roi_heads.box_head[0].register_forward_hook(lambda *_: runs.append(1))
    with EventStorage():
        model(make_batch())
    assert len(runs) == calls


def test_another_student_runs_its_head_once(pair_cfg):
    model, runs = build_model(pair_cfg("faster_rcnn-faster_rcnn")).train(), []
    model.student.roi_heads.box_head.register_forward_hook(lambda *_: runs.append(1))
    with EventStorage():
        model(make_batch())
    assert len(runs) == 1 and model.adapter.stages_compared == 1


def test_a_cascade_without_a_region_has_every_gradient(pair_cfg):
    model = build(pair_cfg("faster_rcnn-cascade_rcnn", {"DISTILL.LOSSES": ("CKD", "CLS", "REG")}))
    with EventStorage():
        losses = model(make_batch(boxes_each=0))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
