"""Masked generative distillation: the function against plain loops, and its masks."""

import pytest
import torch
from torch.autograd import gradcheck

from conftest import make_cfg
from gdetkd.losses import MGD, masked_generation
from gdetkd.structures import DetectorOutputs, DetectorSpec

SPEC = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0))


def random_maps(*shape):
    return torch.randn(2, *shape, dtype=torch.float64)


def twice(maps):
    return 2 * maps


def test_matches_plain_loops():
    student, teacher = random_maps(2, 3, 4, 5)
    visible = torch.rand(2, 1, 4, 5) > 0.5
    expected = 0.0
    for image in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    shown = float(student[image, c, y, x]) if visible[image, 0, y, x] else 0.0
                    expected += (2 * shown - float(teacher[image, c, y, x])) ** 2 / 2
    assert masked_generation(student, teacher, visible, twice).item() == pytest.approx(expected, rel=1e-12)


def test_closed_form_and_zero():
    ones = torch.ones(1, 2, 1, 2)
    # The visible cell is generated as 2 and the masked cell as 0. Both are wrong by 1, in two channels.
    assert masked_generation(ones, ones, torch.tensor([[[[True, False]]]]), twice).item() == 4.0
    assert masked_generation(ones, 2 * ones, torch.ones(1, 1, 1, 2), twice).item() == 0


def test_gradcheck():
    student, teacher = random_maps(2, 2, 3, 3)
    visible = torch.rand(2, 1, 3, 3) > 0.5
    generate = torch.nn.Conv2d(2, 2, 3, padding=1).double()
    assert gradcheck(lambda s: masked_generation(s, teacher, visible, generate), student.requires_grad_())


def test_nothing_gives_zero_with_a_gradient_path():
    student = torch.zeros(0, 3, 4, 5, requires_grad=True)
    value = masked_generation(student, torch.zeros(0, 3, 4, 5), torch.zeros(0, 1, 4, 5), twice)
    value.backward()
    assert value.item() == 0 and student.grad is not None


def outputs():
    return DetectorOutputs({"p2": torch.randn(2, 4, 40, 40), "p3": torch.randn(2, 4, 20, 20)}, SPEC.strides)


def test_the_configured_share_is_masked_for_all_channels_at_once():
    module = MGD(make_cfg({"DISTILL.MGD.TWO_STAGE.MASK_RATIO": 0.3}), SPEC, SPEC)
    seen = []
    for block in module.generate:
        block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0] == 0))
    module(outputs(), outputs())
    assert len(seen) == 2 and all(torch.equal(mask[:, :1].expand_as(mask), mask) for mask in seen)
    assert float(seen[0].float().mean()) == pytest.approx(0.3, abs=0.03)


def test_masks_come_from_the_global_generator():
    module, student, teacher = MGD(make_cfg({}), SPEC, SPEC), outputs(), outputs()
    torch.manual_seed(3)
    first, second = module(student, teacher), module(student, teacher)
    torch.manual_seed(3)
    assert module(student, teacher) == first != second


def test_the_authors_factor():
    module = MGD(make_cfg({"DISTILL.MGD.TWO_STAGE.MASK_RATIO": 0.0}), SPEC, SPEC)
    student, teacher = outputs(), outputs()
    levels = zip(module.generate, student.pyramid.values(), teacher.pyramid.values())
    errors = [((generate(student_map) - teacher_map) ** 2).sum() / 2 for generate, student_map, teacher_map in levels]
    torch.testing.assert_close(module(student, teacher), 5e-7 * sum(errors))
