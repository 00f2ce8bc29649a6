"""The functions of CrossKD. tests/detectors/test_rivals.py tests the whole loss, which needs a teacher's head."""

import math

import pytest
import torch
from fvcore.nn import giou_loss
from test_ckd import iou
from torch.autograd import gradcheck

from gdetkd.losses import cross_classification, cross_localization
from gdetkd.losses.crosskd import _giou_loss, align_scale

LABELS = torch.tensor([[1, 0, -1, 1], [0, 0, 1, -1]])


def random_boxes():
    corner = torch.rand(2, 4, 2, dtype=torch.float64) * 20
    return torch.cat([corner, corner + 3 + torch.rand(2, 4, 2, dtype=torch.float64) * 20], dim=-1)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_classification_matches_plain_loops(beta):
    cross, teacher = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    expected = 0.0
    for image in range(2):
        for anchor in range(4):
            if LABELS[image, anchor] < 0:
                continue
            for c, t in zip(cross[image, anchor].tolist(), teacher[image, anchor].tolist()):
                p, q = sigmoid(c), sigmoid(t)
                expected -= abs(p - q) ** beta * (q * math.log(p) + (1 - q) * math.log(1 - p)) / 3
    assert cross_classification(cross, teacher, LABELS, beta).item() == pytest.approx(expected, rel=1e-10)


def giou(a, b):
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    hull = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    overlap = iou(a, b)
    union = (area(a) + area(b)) / (1 + overlap)
    return overlap - (area(hull) - union) / area(hull)


def test_the_giou_loss_and_its_gradient_are_those_of_fvcore():
    first, second = random_boxes().requires_grad_(), random_boxes()
    second[0, 0] = first[0, 0].detach() + 100  # apart from each other
    losses, expected = _giou_loss(first, second), giou_loss(first, second)
    torch.testing.assert_close(losses, expected)
    weights = torch.randn_like(losses)
    gradients = [torch.autograd.grad((loss * weights).sum(), first)[0] for loss in (losses, expected)]
    torch.testing.assert_close(*gradients)


def test_localization_matches_plain_loops():
    cross, teacher, logits = random_boxes(), random_boxes(), torch.randn(2, 4, 3, dtype=torch.float64)
    expected = 0.0
    for image in range(2):
        for anchor in range(4):
            if LABELS[image, anchor] >= 0:
                confidence = max(map(sigmoid, logits[image, anchor].tolist()))
                expected += confidence * (1 - giou(cross[image, anchor].tolist(), teacher[image, anchor].tolist())) / 3
    assert cross_localization(cross, teacher, logits, LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_closed_forms():
    # Score 1/2 of the teacher's, 3/4 of the student's: |1/4| times the cross-entropy.
    one = torch.tensor([[1]])
    loss = cross_classification(torch.full((1, 1, 1), math.log(3.0)), torch.zeros(1, 1, 1), one)
    assert loss.item() == pytest.approx(-0.25 * 0.5 * (math.log(0.75) + math.log(0.25)))
    # Half of the teacher's box: IoU 1/2 and no hull beyond it, at a confidence of 1/2.
    half, whole = torch.tensor([[[0.0, 0.0, 4.0, 2.0]]]), torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    assert cross_localization(half, whole, torch.zeros(1, 1, 1), one).item() == pytest.approx(0.25)


def test_zero_where_equal():
    boxes, logits = random_boxes(), torch.randn(2, 4, 3, dtype=torch.float64)
    assert cross_classification(logits, logits, LABELS).item() == 0
    assert cross_localization(boxes, boxes, logits, LABELS).item() == pytest.approx(0, abs=1e-6)


def test_no_positive_anchor_and_no_anchor_at_all():
    cross, teacher = torch.randn(2, 2, 4, 3)
    assert cross_classification(cross, teacher, torch.zeros(2, 4)) > 0
    assert cross_classification(cross, teacher, torch.full((2, 4), -1)).item() == 0
    empty = torch.zeros(0, 4, 3, requires_grad=True)
    loss = cross_classification(empty, empty.detach(), torch.zeros(0, 4))
    boxes = torch.zeros(0, 4, 4, requires_grad=True)
    loss = loss + cross_localization(boxes, boxes.detach(), empty.detach(), torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0 and empty.grad is not None and boxes.grad is not None


def test_boxes_without_area_are_left_out():
    flat = torch.tensor([[[3.0, 3.0, 3.0, 9.0]]])
    assert cross_localization(flat + 1, flat, torch.zeros(1, 1, 1), torch.tensor([[1]])).item() == 0


def test_gradcheck():
    logits, teacher = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    assert gradcheck(lambda x: cross_classification(x, teacher, LABELS), logits.requires_grad_())
    boxes, target = random_boxes(), random_boxes()
    assert gradcheck(lambda x: cross_localization(x, target, teacher, LABELS), boxes.requires_grad_())


def test_features_get_the_teachers_scale():
    student, teacher = torch.randn(2, 3, 4, 5) * 7 + 2, torch.randn(2, 3, 4, 5) * 0.5 - 1
    aligned = align_scale(student, teacher)
    for statistic in (torch.mean, lambda maps, dims: torch.std(maps, dims, unbiased=False)):
        torch.testing.assert_close(statistic(aligned, (0, 2, 3)), statistic(teacher, (0, 2, 3)))
    torch.testing.assert_close(align_scale(teacher, teacher), teacher)
