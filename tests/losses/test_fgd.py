"""Focal and global distillation: its parts against plain loops, and the whole term."""

import math
from dataclasses import replace

import pytest
import torch
from detectron2.structures import Boxes
from torch.autograd import gradcheck

from conftest import make_cfg
from gdetkd.losses import FGD, attention_imitation, focal_imitation
from gdetkd.losses.fgd import Attention, GlobalContext, attention, scale_masks
from gdetkd.structures import DenseSpec, DetectorOutputs, DetectorSpec

SPEC = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0))


def random_maps(*shape):
    return torch.randn(2, *shape, dtype=torch.float64)


def test_attention_matches_plain_loops():
    (maps,) = random_maps(2, 3, 4, 5)[:1]
    found = attention(maps, 0.5)
    for image in range(2):
        absolute = [[[abs(v) for v in row] for row in channel] for channel in maps[image].tolist()]
        spatial = [math.exp(sum(c[y][x] for c in absolute) / 3 / 0.5) for y in range(4) for x in range(5)]
        channel = [math.exp(sum(map(sum, c)) / 20 / 0.5) for c in absolute]
        assert found.spatial[image].flatten().tolist() == pytest.approx([20 * v / sum(spatial) for v in spatial])
        assert found.channel[image].tolist() == pytest.approx([3 * v / sum(channel) for v in channel])


def test_scale_masks():
    # On 2 x 4 cells of 8 pixels: an object of 4 cells, and one of a single cell within it, whose share is larger.
    boxes = [torch.tensor([[0.0, 0.0, 16.0, 16.0], [8.0, 8.0, 16.0, 16.0]]), torch.zeros(0, 4)]
    foreground, background = scale_masks(boxes, 8, (2, 4))
    assert foreground[0].tolist() == [[0.25, 0.25, 0, 0], [0.25, 1.0, 0, 0]]
    assert background[0].tolist() == [[0, 0, 0.25, 0.25], [0, 0, 0.25, 0.25]]
    assert not foreground[1].any() and background[1].unique().tolist() == [1 / 8]
    everywhere, nowhere = scale_masks([torch.tensor([[0.0, 0.0, 32.0, 16.0]])], 8, (2, 4))
    assert everywhere.unique().tolist() == [1 / 8] and not nowhere.any()


def test_focal_imitation_matches_plain_loops():
    student, teacher = random_maps(2, 3, 4, 5)
    mask, weights = torch.rand(2, 4, 5, dtype=torch.float64), attention(teacher, 0.5)
    expected = 0.0
    for image in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    weight = float(mask[image, y, x] * weights.spatial[image, y, x] * weights.channel[image, c])
                    expected += weight * float(student[image, c, y, x] - teacher[image, c, y, x]) ** 2 / 2
    assert focal_imitation(student, teacher, mask, weights).item() == pytest.approx(expected, rel=1e-10)
    assert focal_imitation(teacher, teacher, mask, weights).item() == 0


def test_closed_forms():
    even = Attention(torch.ones(1, 2, 2), torch.ones(1, 3))
    loss = focal_imitation(torch.full((1, 3, 2, 2), 2.0), torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 0.25), even)
    assert loss.item() == 12.0  # 4 cells of 1/4, 3 channels, an error of 4
    uneven = Attention(torch.full((1, 2, 2), 1.5), torch.zeros(1, 3))
    assert attention_imitation(uneven, even).item() == 4 * 0.5 + 3 * 1.0
    assert attention_imitation(even, even).item() == 0


def test_gradcheck():
    student, teacher = random_maps(2, 2, 3, 3)
    student.requires_grad_()
    mask = torch.rand(2, 3, 3, dtype=torch.float64)
    weights = attention(teacher, 0.5)
    assert gradcheck(lambda s: focal_imitation(s, teacher, mask, weights), student)
    assert gradcheck(lambda s: attention_imitation(attention(s, 0.5), weights), student)
    context = GlobalContext(2).double()
    torch.nn.init.normal_(context.expand.weight)
    assert gradcheck(context, student)


def test_global_context_matches_plain_loops():
    context, (maps,) = GlobalContext(4).double(), random_maps(2, 4, 2, 3)[:1]
    assert torch.equal(context(maps), maps)  # as it starts
    torch.nn.init.normal_(context.expand.weight)
    found = context(maps)
    for image in range(2):
        cells = maps[image].flatten(1).t()  # (6, 4)
        scores = [math.exp(float(cell @ context.attend.weight.flatten() + context.attend.bias)) for cell in cells]
        gathered = sum(score / sum(scores) * cell for score, cell in zip(scores, cells))
        hidden = context.reduce.weight @ gathered + context.reduce.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + context.norm.eps).sqrt()
        added = context.expand.weight @ hidden.clamp(min=0) + context.expand.bias
        torch.testing.assert_close(found[image], maps[image] + added[:, None, None])


def outputs(boxes):
    maps = {"p2": torch.randn(2, 4, 6, 6), "p3": torch.randn(2, 4, 3, 3)}
    return DetectorOutputs(maps, SPEC.strides, gt_boxes=boxes)


def test_the_term_is_the_sum_of_its_parts_with_the_authors_factors():
    module = FGD(make_cfg({}), SPEC, SPEC)
    boxes = [Boxes(torch.tensor([[2.0, 2.0, 11.0, 9.0]])), Boxes(torch.zeros(0, 4))]
    student, teacher = outputs(boxes), outputs(boxes)
    expected = 0.0
    for name, stride in SPEC.strides.items():
        student_map, teacher_map = student.pyramid[name], teacher.pyramid[name]
        weights = attention(teacher_map, 0.5)
        gt_boxes = [image_boxes.tensor for image_boxes in boxes]
        foreground, background = scale_masks(gt_boxes, stride, teacher_map.shape[-2:])
        expected += 5e-5 * focal_imitation(student_map, teacher_map, foreground, weights)
        expected += 2.5e-5 * focal_imitation(student_map, teacher_map, background, weights)
        expected += 5e-5 * attention_imitation(attention(student_map, 0.5), weights)
        expected += 5e-7 * ((student_map - teacher_map) ** 2).sum() / 2  # both contexts start as the identity
    loss = module(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not [name for name, parameter in module.named_parameters() if parameter.grad is None]


def test_families_have_factors_of_their_own():
    dense = replace(SPEC, dense=DenseSpec(anchor_based=False))
    anchored = replace(SPEC, dense=DenseSpec(anchor_based=True))
    assert [FGD(make_cfg({}), spec, SPEC).config.ALPHA for spec in (SPEC, anchored, dense)] == [5e-5, 1e-3, 1.6e-3]
