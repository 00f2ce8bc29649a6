"""Losses within a mask: GTMASK within ground-truth boxes, and FGFI in cells with anchors near objects."""

import pytest
import torch
from test_ckd import iou
from torch.autograd import gradcheck

from gdetkd.losses import fine_grained_imitation, ground_truth_mask_imitation
from gdetkd.losses.fgfi import near_object_cells, place_anchors
from gdetkd.losses.gt_mask import object_mask


def random_levels(channels=3):
    shapes = [(2, channels, 4, 5), (2, channels, 2, 3)]
    student, teacher = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    return student, teacher, [torch.rand(shape[0], *shape[2:]) > 0.5 for shape in shapes]


def loop(student, teacher, masks):
    """Return the sum of squared errors over masked cells and channels, and the number of masked cells."""
    total, cells = 0.0, 0
    for s, t, mask in zip(student, teacher, masks):
        for image, y, x in torch.nonzero(mask).tolist():
            cells += 1
            total += sum((a - b) ** 2 for a, b in zip(s[image, :, y, x].tolist(), t[image, :, y, x].tolist()))
    return total, cells


def test_match_plain_loops():
    levels = random_levels()
    total, cells = loop(*levels)
    assert ground_truth_mask_imitation(*levels).item() == pytest.approx(total / (3 * cells), rel=1e-12)
    assert fine_grained_imitation(*levels).item() == pytest.approx(total / (2 * cells), rel=1e-12)


def test_closed_forms_and_zero():
    # One of two cells is masked. Its error is 2 in each of 3 channels.
    student, teacher = torch.full((1, 3, 1, 2), 3.0), torch.ones(1, 3, 1, 2)
    mask = [torch.tensor([[[True, False]]])]
    assert ground_truth_mask_imitation([student], [teacher], mask).item() == 4.0
    assert fine_grained_imitation([student], [teacher], mask).item() == 6.0
    for loss in (ground_truth_mask_imitation, fine_grained_imitation):
        assert loss([teacher], [teacher], mask).item() == 0


def test_gradcheck():
    student, teacher, masks = random_levels(channels=2)
    for loss in (ground_truth_mask_imitation, fine_grained_imitation):
        assert gradcheck(lambda *s: loss(s, teacher, masks), tuple(s.requires_grad_() for s in student))


def test_no_masked_cell_gives_zero_with_a_gradient_path():
    student, teacher, masks = random_levels()
    for loss in (ground_truth_mask_imitation, fine_grained_imitation):
        inputs = [s.clone().requires_grad_() for s in student]
        value = loss(inputs, teacher, [torch.zeros_like(mask) for mask in masks])
        value.backward()
        assert value.item() == 0 and all(s.grad is not None for s in inputs)


def test_object_mask_is_the_union_of_boxes():
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 8.0, 25.0, 9.0]]), torch.zeros(0, 4)]
    mask = object_mask(boxes, 8, (2, 4))
    assert mask[0].tolist() == [[True, False, False, False], [False, False, True, True]]
    assert not mask[1].any()


def random_anchors():
    cells = torch.tensor([[-6.0, -6.0, 6.0, 6.0], [-9.0, -4.0, 9.0, 4.0]])
    return [place_anchors(cells, 8, 0.5, (5, 6)), place_anchors(2 * cells, 16, 0.5, (3, 3))]


@pytest.mark.parametrize("factor", [0.3, 0.5, 0.9])
def test_near_object_cells_match_plain_loops(factor):
    anchors = random_anchors()
    boxes = torch.tensor([[3.0, 5.0, 17.0, 16.0], [20.0, 10.0, 44.0, 38.0]])
    found = near_object_cells(anchors, boxes, factor)
    expected = [torch.zeros(level.shape[:2], dtype=torch.bool) for level in anchors]
    for box in boxes.tolist():
        largest = max(iou(anchor, box) for level in anchors for anchor in level.reshape(-1, 4).tolist())
        for mask, level in zip(expected, anchors):
            for y in range(level.shape[0]):
                for x in range(level.shape[1]):
                    mask[y, x] |= any(iou(anchor, box) > factor * largest for anchor in level[y, x].tolist())
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert 0 < sum(int(mask.sum()) for mask in expected) < 39


def test_no_object_no_cell():
    assert not any(mask.any() for mask in near_object_cells(random_anchors(), torch.zeros(0, 4), 0.5))


def test_anchors_lie_where_detectron2_has_them():
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    for offset in (0.0, 0.5):
        generator = DefaultAnchorGenerator(sizes=[[8, 16]], aspect_ratios=[[0.5, 1.0]], strides=[8], offset=offset)
        expected = generator([torch.zeros(1, 1, 3, 4)])[0].tensor
        found = place_anchors(list(generator.cell_anchors)[0], 8, offset, (3, 4))
        torch.testing.assert_close(found.reshape(-1, 4), expected)
