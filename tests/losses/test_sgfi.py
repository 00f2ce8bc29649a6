"""Semantic-guided imitation: the equations against plain loops, and the faster module against the equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes

from conftest import LargeTensors, make_cfg
from gdetkd.errors import GDetKDError
from gdetkd.losses import SGFI, level_attention, semantic_guided_imitation
from gdetkd.roi_align import roi_align_torchvision
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

TAU = torch.tensor(0.7, dtype=torch.float64)


def spec(channels, pooled=(7, 7)):
    return DetectorSpec(channels, {"p2": 4, "p3": 8}, pooled, 16, 3, (10.0, 10.0, 5.0, 5.0))


def random_inputs(n=3, levels=4, channels=2, size=3, dim=5):
    student = torch.randn(n, levels, channels, size, size, dtype=torch.float64)
    return (
        student,
        torch.randn(n, channels, size, size, dtype=torch.float64),
        torch.randn(n, levels, dim, dtype=torch.float64),
        torch.randn(n, dim, dtype=torch.float64),
    )


def plain_loops(student, teacher, student_keys, teacher_keys, tau):
    """Compute the equations one number at a time."""
    n, levels, channels, height, width = student.shape
    alpha = torch.zeros(n, levels, dtype=student.dtype)
    total = 0.0
    for i in range(n):
        logits = [
            sum(float(a * b) for a, b in zip(student_keys[i, l], teacher_keys[i])) / float(tau) for l in range(levels)
        ]
        norm = sum(math.exp(v) for v in logits)
        for l in range(levels):
            alpha[i, l] = math.exp(logits[l]) / norm
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    aggregated = sum(float(alpha[i, l] * student[i, l, c, y, x]) for l in range(levels))
                    total += (aggregated - float(teacher[i, c, y, x])) ** 2
    return total / (n * channels * height * width), alpha


def test_matches_plain_loops():
    inputs = random_inputs()
    loss, alpha = semantic_guided_imitation(*inputs, TAU)
    expected, expected_alpha = plain_loops(*inputs, TAU)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(alpha, expected_alpha)


def test_closed_form():
    # Two levels with logits ln 3 and 0 at tau = 1: alpha = 3/4, 1/4. Levels of constant 4 and 0 aggregate to 3;
    # the teacher is 1 everywhere, so the loss is (3 - 1)^2 = 4.
    student = torch.stack([torch.full((1, 1, 2, 2), 4.0), torch.zeros(1, 1, 2, 2)], dim=1)
    keys = torch.tensor([[[math.log(3.0)], [0.0]]])
    loss, alpha = semantic_guided_imitation(student, torch.ones(1, 1, 2, 2), keys, torch.ones(1, 1), torch.tensor(1.0))
    torch.testing.assert_close(alpha, torch.tensor([[0.75, 0.25]]))
    assert loss.item() == pytest.approx(4.0)


def test_zero_where_every_level_is_the_teacher():
    teacher = torch.randn(3, 2, 4, 4)
    student = teacher[:, None].expand(-1, 5, -1, -1, -1)
    loss, _ = semantic_guided_imitation(student, teacher, torch.randn(3, 5, 2), torch.randn(3, 2), torch.tensor(1.0))
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_attention_sums_to_one_over_levels_not_regions():
    alpha = level_attention(torch.randn(6, 4, 3), torch.randn(6, 3), torch.tensor(0.5))
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(6))
    assert not torch.allclose(alpha.sum(dim=0), torch.ones(4))


def test_gradcheck():
    student, teacher, student_keys, teacher_keys = (t.requires_grad_() for t in random_inputs(n=2, levels=3))
    tau = TAU.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: semantic_guided_imitation(*a)[0], (student, teacher, student_keys, teacher_keys, tau)
    )


def test_no_regions():
    student, teacher, student_keys, teacher_keys = (t.requires_grad_() for t in random_inputs(n=0))
    loss, alpha = semantic_guided_imitation(student, teacher, student_keys, teacher_keys, TAU)
    loss.backward()
    assert loss.item() == 0 and alpha.shape == (0, 4) and student.grad is not None


def make_module(student_channels=3, teacher_channels=4):
    cfg = make_cfg({"DISTILL.SGFI.TAU": 2.0})
    return SGFI(cfg, spec(student_channels), spec(teacher_channels)).double()


def regions(*shape):
    return torch.randn(*shape, 7, 7, dtype=torch.float64, requires_grad=True)


def test_folded_adapter_equals_the_equations_in_value_and_gradient():
    module, rois, target = make_module(), regions(5, 3, 3), regions(5, 4).detach()
    module.imitate(rois, target).backward()
    fast = [rois.grad] + [p.grad.clone() for p in module.parameters()]
    loss = module.imitate(rois, target)
    rois.grad = None
    module.zero_grad()
    adapted = module.adapter(rois.flatten(0, 1))
    keys = module.embed(adapted).view(5, 3, -1)
    plain, _ = semantic_guided_imitation(adapted.view(5, 3, 4, 7, 7), target, keys, module.embed(target), module.tau)
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for a, b in zip(fast, [rois.grad] + [p.grad for p in module.parameters()]):
        torch.testing.assert_close(a, b)


def test_regions_on_all_levels_get_a_gradient_of_each_use_and_none_of_their_sum():
    module, target = make_module(), regions(5, 4).detach()
    cells = torch.randn(5, 8, 7, 7, 3, dtype=torch.float64, requires_grad=True)  # in memory as RoIAlign gives them
    with LargeTensors(cells.numel()) as large:
        module.imitate(cells.permute(0, 1, 4, 2, 3), target).backward()
    assert len(large.storages) == 3  # with the regions themselves
    assert cells.grad.abs().sum() > 0


def test_it_pools_each_region_on_each_level_and_imitates_that():
    module = make_module().float()
    boxes = [Boxes(torch.tensor([[2.0, 3.0, 30.0, 25.0], [8.0, 8.0, 20.0, 28.0]]))]
    maps = {name: torch.randn(1, 3, size, size) for name, size in (("p2", 16), ("p3", 8))}
    student = DetectorOutputs(maps, {"p2": 4, "p3": 8}, Regions(boxes))
    target = torch.randn(2, 4, 7, 7)
    levels = [roi_align_torchvision(*level, Regions(boxes), (7, 7), 2) for level in zip(maps.values(), (4, 8))]
    expected = module.imitate(torch.stack(levels, dim=1), target)
    torch.testing.assert_close(module(student, DetectorOutputs({}, {}, pooled=target)), expected)


def test_embedding_is_two_strided_convolutions_with_relu():
    embed = make_module().embed
    rois = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    hidden = F.relu(F.conv2d(rois, embed.conv1.weight, embed.conv1.bias, stride=2))
    expected = F.relu(F.conv2d(hidden, embed.conv2.weight, embed.conv2.bias, stride=2))
    assert expected.shape == (2, 6, 1, 1)
    torch.testing.assert_close(embed(rois), expected.flatten(1))
    embed.negative_slope = 0.5
    hidden = F.conv2d(rois, embed.conv1.weight, embed.conv1.bias, stride=2)
    hidden = F.conv2d(torch.where(hidden > 0, hidden, hidden / 2), embed.conv2.weight, embed.conv2.bias, stride=2)
    torch.testing.assert_close(embed(rois), torch.where(hidden > 0, hidden, hidden / 2).flatten(1))


def test_module_without_regions_gives_every_parameter_a_gradient():
    module = make_module()
    student = DetectorOutputs({"p2": torch.randn(1, 3, 8, 8)}, {"p2": 4}, Regions([Boxes(torch.zeros(0, 4))]))
    loss = module.float()(student, DetectorOutputs({}, {}, pooled=torch.zeros(0, 4, 7, 7)))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None for p in module.parameters())


def test_tau_starts_as_configured_and_stays_positive():
    module = make_module()
    assert module.tau.item() == pytest.approx(2.0)
    optimizer = torch.optim.SGD([module.log_tau], lr=100.0)
    (module.tau * 1.0).backward()
    optimizer.step()
    assert module.tau.item() > 0


def test_errors_name_the_key():
    with pytest.raises(GDetKDError, match="POOLER_RESOLUTION"):
        SGFI(make_cfg({}), spec(3), spec(3, pooled=(5, 5)))
    with pytest.raises(GDetKDError, match="DISTILL.SGFI.TAU"):
        SGFI(make_cfg({"DISTILL.SGFI.TAU": 0.0}), spec(3), spec(3))
    with pytest.raises(GDetKDError, match="DISTILL.SGFI.SAMPLING_RATIO is 0. Set it to at least 1"):
        SGFI(make_cfg({"DISTILL.SGFI.SAMPLING_RATIO": 0}), spec(3), spec(3))
