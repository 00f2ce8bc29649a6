"""A student's own losses ignore the places of doubtful boxes: in the RPN, in box heads, in cascades, in dense heads."""

import contextlib

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from conftest import CASCADE, DENSE, make_batch, make_cfg
from gdetkd.detectors import DetectorAdapter, build_adapter
from gdetkd.errors import GDetKDError

FAMILIES = {
    "faster_rcnn": {},
    "cascade_rcnn": CASCADE,
    "retinanet": {"MODEL.META_ARCHITECTURE": "RetinaNet", **DENSE},
    "fcos": {"MODEL.META_ARCHITECTURE": "FCOS", **DENSE},
}
SIZE = (64, 64)
OBJECT, DOUBTFUL = [4.0, 4.0, 30.0, 30.0], [33.0, 33.0, 61.0, 60.0]


def build(family, changes={}):
    torch.manual_seed(0)
    cfg = make_cfg({**FAMILIES[family], **changes})
    model = build_model(cfg).train()
    return model, build_adapter(model, "student", cfg)


def objects(boxes=(OBJECT,)):
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    instances.gt_classes = torch.arange(len(boxes))
    return instances


def doubtful(*images):
    return [Boxes(torch.tensor(boxes).view(-1, 4)) for boxes in images]


def proposals(count=400, seed=0):
    rng = torch.Generator().manual_seed(seed)
    near = torch.tensor([OBJECT, DOUBTFUL]).repeat(count // 4, 1) + torch.randn(count // 2, 4, generator=rng) * 4
    corner = torch.rand(count // 2, 2, generator=rng) * 40
    anywhere = torch.cat([corner, corner + 4 + torch.rand(count // 2, 2, generator=rng) * 20], dim=1)
    found = Instances(SIZE)
    found.proposal_boxes = Boxes(torch.cat([near, anywhere]).clamp(0, 64))
    found.objectness_logits = torch.zeros(count)
    return found


def anchors_of(generator, strides):
    return generator([torch.zeros(1, 1, max(1, SIZE[0] // stride), max(1, SIZE[1] // stride)) for stride in strides])


@pytest.mark.parametrize("boxes", [[], [DOUBTFUL]])
def test_the_rpn_ignores_anchors(boxes):
    model, adapter = build(
        "faster_rcnn", {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000, "MODEL.RPN.POSITIVE_FRACTION": 1.0}
    )
    rpn = model.proposal_generator
    anchors = anchors_of(rpn.anchor_generator, (4, 8, 16, 32))
    before = rpn.label_and_sample_anchors(anchors, [objects()])[0][0]
    with adapter.ignoring(doubtful(boxes)):
        labels = rpn.label_and_sample_anchors(anchors, [objects()])[0][0]
    if not boxes:
        assert torch.equal(labels, before)
        return
    as_objects = rpn.label_and_sample_anchors(anchors, [objects([DOUBTFUL])])[0][0]
    for label, plain, other in zip(labels.tolist(), before.tolist(), as_objects.tolist()):
        assert label == (-1 if plain == 0 and other != 0 else plain)
    assert (labels != before).sum() > 3 and (labels == 0).any() and (labels == 1).any()
    assert torch.equal(rpn.label_and_sample_anchors(anchors, [objects()])[0][0], before)


@pytest.mark.parametrize("family", ["faster_rcnn", "cascade_rcnn"])
def test_a_box_head_does_not_sample_doubtful_proposals(family):
    model, adapter = build(
        family, {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100000, "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0}
    )
    heads = model.roi_heads
    with EventStorage():
        [before] = heads.label_and_sample_proposals([proposals()], [objects()])
        with adapter.ignoring(doubtful([DOUBTFUL])):
            [sampled] = heads.label_and_sample_proposals([proposals()], [objects()])
    iou = pairwise_iou(before.proposal_boxes, Boxes(torch.tensor([DOUBTFUL])))[:, 0]
    expected = before[~((before.gt_classes == heads.num_classes) & (iou >= 0.5))]
    assert 0 < len(expected) < len(before) and len(sampled) == len(expected)
    rows = [sorted(map(tuple, found.proposal_boxes.tensor.tolist())) for found in (sampled, expected)]
    assert rows[0] == rows[1] and (sampled.gt_classes == 0).sum() == (before.gt_classes == 0).sum() > 0


def test_later_stages_of_a_cascade_leave_doubtful_proposals_out():
    model, adapter = build("cascade_rcnn")
    heads = model.roi_heads
    with EventStorage():
        for stage, threshold in ((1, 0.6), (2, 0.7)):
            with adapter.ignoring(doubtful([DOUBTFUL])):
                [labelled] = heads._match_and_label_boxes([proposals()], stage, [objects()])
            [before] = heads._match_and_label_boxes([proposals()], stage, [objects()])
            iou = pairwise_iou(before.proposal_boxes, Boxes(torch.tensor([DOUBTFUL])))[:, 0]
            expected = before[~((before.gt_classes == heads.num_classes) & (iou >= threshold))]
            assert 0 < len(expected) < len(before)
            assert torch.equal(labelled.proposal_boxes.tensor, expected.proposal_boxes.tensor)
            assert torch.equal(labelled.gt_classes, expected.gt_classes)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_dense_head_ignores_places(family):
    model, adapter = build(family)
    anchors = anchors_of(model.anchor_generator, (8, 16, 32, 64, 128))
    before = model.label_anchors(anchors, [objects()])[0][0]
    with adapter.ignoring(doubtful([DOUBTFUL])):
        labels = model.label_anchors(anchors, [objects()])[0][0]
    as_objects = model.label_anchors(anchors, [objects([DOUBTFUL])])[0][0]
    background = model.num_classes
    for label, plain, other in zip(labels.tolist(), before.tolist(), as_objects.tolist()):
        assert label == (-1 if plain == background and other != background else plain)
    assert (labels != before).any() and (labels == background).any() and (labels == 0).any()


def test_an_ignored_location_of_fcos_has_no_loss_and_no_gradient():
    model, _ = build("fcos")
    torch.manual_seed(1)
    anchors = anchors_of(model.anchor_generator, (8, 16))
    places = [len(level) for level in anchors]
    labels = torch.full((1, sum(places)), model.num_classes)
    labels[0, 3], labels[0, 10:20] = 1, -1
    _, boxes = model.label_anchors(anchors, [objects()])  # tensors or `Boxes`, as the Detectron2 version has them
    logits = [torch.randn(1, count, model.num_classes, requires_grad=True) for count in places]
    deltas = [torch.rand(1, count, 4) for count in places]
    centerness = [torch.zeros(1, count, 1) for count in places]
    with EventStorage():
        loss = model.losses(anchors, logits, list(labels), deltas, boxes, centerness)["loss_fcos_cls"]
    loss.backward()
    gradient = torch.cat([level.grad for level in logits], dim=1)[0]
    assert (gradient[10:20] == 0).all() and (gradient[:10] != 0).all() and (gradient[20:] != 0).all()
    probability = torch.cat(logits, dim=1)[0].detach().sigmoid()
    expected = 0.0
    for place, label in enumerate(labels[0].tolist()):
        for index in range(model.num_classes):
            p = float(probability[place, index])
            if label == index:
                expected += -0.25 * (1 - p) ** 2 * torch.log(torch.tensor(p))
            elif label >= 0:
                expected += -0.75 * p**2 * torch.log(torch.tensor(1 - p))
    assert torch.allclose(loss.detach() * float(model.loss_normalizer), torch.as_tensor(expected), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_doubtful_boxes_is_the_plain_step(family):
    losses = []
    for is_inside in (False, True):
        model, adapter = build(family)
        torch.manual_seed(3)
        with EventStorage(), adapter.ignoring(doubtful([], [])) if is_inside else contextlib.nullcontext():
            losses.append(model(make_batch()))
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) > 1
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_places_may_be_doubtful_and_an_image_may_have_no_object(family, monkeypatch):
    model, adapter = build(family)
    every = lambda matcher, boxes, places: torch.full((len(places),), len(boxes) > 0)  # noqa: E731
    monkeypatch.setattr("gdetkd.detectors.doubt.would_match", every)
    monkeypatch.setattr("gdetkd.detectors.rcnn.would_match", every)
    batch = make_batch(boxes_each=0)
    with EventStorage(), adapter.ignoring(doubtful([[0.0, 0.0, 64.0, 64.0]], [DOUBTFUL] * 3)):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    if family in ("faster_rcnn", "cascade_rcnn"):
        assert all(float(loss.detach()) == 0 for loss in losses.values())


def test_a_family_that_cannot_ignore_boxes_says_so():
    class Other(DetectorAdapter):
        matches = spec = points = observe = look = None

    with pytest.raises(GDetKDError, match="Other does not support that. Write its method `ignoring`"):
        Other(torch.nn.Linear(1, 1), "student", make_cfg({})).ignoring([])
