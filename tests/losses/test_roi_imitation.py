"""RoI imitation on one level: values, the choice of levels, and the pooling."""

import pytest
import torch
from detectron2.structures import Boxes
from torch.autograd import gradcheck

from conftest import make_cfg
from gdetkd.losses import ROIFI, roi_imitation
from gdetkd.losses.roi_imitation import nearest_levels
from gdetkd.roi_align import pool_on_levels, roi_align_torchvision
from gdetkd.structures import DetectorOutputs, DetectorSpec, Regions

SPEC = DetectorSpec(4, {"p2": 4, "p3": 8}, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0))


def test_value():
    student, teacher = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist()))
    expected = sum((a - b) ** 2 for a, b in pairs) / 24
    assert roi_imitation(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert roi_imitation(torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)).item() == 4.0
    assert roi_imitation(teacher, teacher).item() == 0
    assert gradcheck(lambda s: roi_imitation(s, teacher), student.requires_grad_())


def test_no_regions():
    student = torch.zeros(0, 3, 2, 2, requires_grad=True)
    loss = roi_imitation(student, torch.zeros(0, 3, 2, 2))
    loss.backward()
    assert loss.item() == 0 and student.grad is not None


def test_levels_of_the_same_stride_or_else_the_nearest():
    assert nearest_levels([4, 8, 16, 32], [4, 8, 16, 32]) == (0, 1, 2, 3)
    assert nearest_levels([8, 16, 32, 64, 128], [4, 8, 16, 32]) == (0, 0, 1, 2)
    assert nearest_levels([4, 8], [8, 16, 32]) == (1, 1, 1)


def random_regions():
    def boxes(count):
        corner = torch.rand(count, 2, dtype=torch.float64) * 15
        return Boxes(torch.cat([corner, corner + 4 + torch.rand(count, 2, dtype=torch.float64) * 10], dim=1))

    regions = Regions([boxes(3), boxes(0), boxes(4)])
    for image_boxes in regions.boxes:
        image_boxes.tensor = image_boxes.tensor.double()  # Detectron2 makes them float32
    return regions, torch.tensor([0, 1, 1, 2, 0, 2, 0])


def test_each_region_is_pooled_on_its_own_level():
    regions, levels = random_regions()
    strides = [2, 4, 8]
    maps = [torch.randn(3, 2, 32 // stride, 32 // stride, dtype=torch.float64) for stride in strides]
    found = pool_on_levels(maps, strides, regions, levels, (3, 3), 2)
    everywhere = [roi_align_torchvision(*pair, regions, (3, 3), 2) for pair in zip(maps, strides)]
    for index, level in enumerate(levels.tolist()):
        torch.testing.assert_close(found[index], everywhere[level][index])


def test_levels_without_regions_stay_in_the_graph():
    """SyncBN's backward pass waits for all processes, also for those without regions on a level."""
    regions, levels = random_regions()
    strides = [2, 4, 8]
    maps = [torch.randn(3, 2, 32 // s, 32 // s, dtype=torch.float64, requires_grad=True) for s in strides]
    pooled = pool_on_levels(maps, strides, regions, torch.zeros_like(levels), (3, 3), 2)
    gradients = torch.autograd.grad(pooled.square().sum(), maps, allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients[1:])


def module_and_outputs(count):
    module = ROIFI(make_cfg({}), SPEC, SPEC)
    maps = {"p2": torch.randn(1, 4, 16, 16, requires_grad=True), "p3": torch.randn(1, 4, 8, 8, requires_grad=True)}
    corner = torch.rand(count, 2) * 30
    regions = Regions([Boxes(torch.cat([corner, corner + 20], dim=1))])
    student = DetectorOutputs(maps, SPEC.strides, regions)
    teacher = DetectorOutputs({}, SPEC.strides, regions, pooled=torch.randn(count, 4, 7, 7))
    teacher.levels = torch.arange(count) % 2
    return module, student, teacher


def test_the_term_compares_the_teachers_level():
    module, student, teacher = module_and_outputs(4)
    loss = module(student, teacher)
    maps, strides = list(student.pyramid.values()), list(SPEC.strides.values())
    pooled = pool_on_levels(maps, strides, student.regions, teacher.levels, (7, 7), 2)
    torch.testing.assert_close(loss, roi_imitation(module.adapter(pooled), teacher.pooled))
    teacher.levels = 1 - teacher.levels
    assert module(student, teacher) != loss


def test_without_regions_every_parameter_has_a_gradient():
    module, student, teacher = module_and_outputs(0)
    loss = module(student, teacher)
    loss.backward()
    assert loss.item() == 0 and all(parameter.grad is not None for parameter in module.parameters())
