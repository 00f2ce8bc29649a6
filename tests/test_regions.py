"""RoIAlign of regions: the CPU's against torchvision's, and boxes in half precision."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from conftest import WIDER, make_batch
from gdetkd.regions import is_aligned, pool_in_full_precision
from gdetkd.roi_align import _pool_with_torchvision, pool_all_levels, roi_align_torchvision
from gdetkd.roi_align_cpu import roi_align_cpu
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher

BOXES = [
    Boxes(torch.tensor([[3.0, 5, 30, 41], [0, 0, 64, 48], [-20, -9, 5, 7], [60, 40, 90, 70], [8, 8, 8, 8]])),
    Boxes(torch.zeros(0, 4)),
    Boxes(torch.tensor([[10.0, 0, 11, 48], [200, 200, 230, 230]])),
]


def test_roi_align_cpu_equals_torchvision_in_value_and_gradient():
    """The boxes lie inside, across the border and outside, one has no area, and one image has no box."""
    regions = Regions(BOXES)
    for stride, sampling in ((4, 2), (8, 1), (16, 3)):
        features = torch.randn(3, 5, 48 // stride, 64 // stride, dtype=torch.float64, requires_grad=True)
        found = roi_align_cpu([features], [stride], regions, (7, 6), sampling)[:, 0]
        expected = roi_align_torchvision(features, stride, regions, (7, 6), sampling)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(found)
        (gradient,) = torch.autograd.grad((found * weights).sum(), features)
        (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), features)
        torch.testing.assert_close(gradient, expected_gradient)


def test_pools_every_region_on_every_level():
    maps = [torch.randn(3, 2, 12, 16), torch.randn(3, 2, 6, 8)]
    pooled = pool_all_levels(maps, [4, 8], Regions(BOXES), (7, 7), 2)
    assert pooled.shape == (7, 2, 2, 7, 7)
    for level, (feature_map, stride) in enumerate(zip(maps, (4, 8))):
        expected = roi_align_torchvision(feature_map, stride, Regions(BOXES), (7, 7), 2)
        torch.testing.assert_close(pooled[:, level], expected)


def test_torchvisions_roi_align_on_all_levels_gives_the_same_values():
    maps = [torch.randn(3, 2, 12, 16), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 3, 4)]
    found = pool_all_levels(maps, [4, 8, 16], Regions(BOXES), (7, 7), 2)
    expected = _pool_with_torchvision(maps, [4, 8, 16], Regions(BOXES), (7, 7), 2)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


def test_a_box_that_is_not_a_number_does_not_spoil_other_boxes():
    boxes = torch.tensor([[3.0, 5, 30, 41], [float("nan"), 0, 9, 9]])
    pooled = roi_align_cpu([torch.randn(1, 2, 6, 8)], [8], Regions([Boxes(boxes)]), (7, 7), 2)
    assert pooled[0].isfinite().all() and pooled[1].isnan().all()


def test_roi_align_cpu_gradcheck():
    maps = [torch.randn(3, 2, size, size + 1, dtype=torch.float64, requires_grad=True) for size in (4, 3)]
    regions = Regions([Boxes(boxes.tensor[:2].double()) for boxes in BOXES])
    assert torch.autograd.gradcheck(lambda *m: roi_align_cpu(m, [12, 16], regions, (3, 2), 2), maps)


def test_roi_align_cpu_without_a_region():
    features = torch.randn(3, 2, 4, 4, requires_grad=True)
    pooled = roi_align_cpu([features], [16], Regions([Boxes(torch.zeros(0, 4))] * 3), (7, 7), 2)
    pooled.sum().backward()
    assert pooled.shape == (0, 1, 2, 7, 7) and features.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
def test_pooling_gives_exactly_what_the_detectors_pooler_gives(kind):
    maps = [torch.randn(3, 2, 48 // stride, 64 // stride) for stride in (4, 8, 16)]
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16], 0, kind, canonical_box_size=24, canonical_level=3)
    assert torch.equal(pool_in_full_precision(pooler, maps, Regions(BOXES)), pooler(maps, BOXES))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
def test_a_teachers_features_are_pooled_where_the_students_are(distill_cfg, kind):
    """The teacher's box head goes on reading what its own pooler gives."""
    keys = {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": kind, "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2}
    teacher, batch = FrozenTeacher(distill_cfg(teacher={**WIDER, **keys})), make_batch()
    regions = Regions([Boxes(torch.tensor([[3.0, 5, 30, 41], [8, 8, 60, 50]])) for _ in batch])
    outputs = teacher.look(batch, regions, {"pooled", "embeddings", "levels"})
    maps, strides = list(outputs.pyramid.values()), list(outputs.strides.values())
    everywhere = pool_all_levels(maps, strides, regions, teacher.spec.pooled_size, 2)
    torch.testing.assert_close(outputs.pooled, everywhere[torch.arange(len(regions)), outputs.levels])
    heads = teacher.model.roi_heads
    expected = heads.box_head(heads.box_pooler(maps, regions.boxes))
    torch.testing.assert_close(outputs.embeddings, expected)
    assert torch.allclose(outputs.pooled, heads.box_pooler(maps, regions.boxes)) == (kind == "ROIAlignV2")


@pytest.mark.parametrize("kind, expected", [("ROIAlign", False), ("ROIAlignV2", True)])
def test_a_users_pooler_is_aligned_if_its_levels_are(kind, expected):
    class OwnPooler(ROIPooler):
        pass

    assert is_aligned(OwnPooler(7, [1 / 4, 1 / 8], 2, kind, canonical_box_size=24, canonical_level=3)) == expected
    assert is_aligned(nn.Identity())  # nothing is known about it


def test_splits_regions_by_level():
    boxes = Regions(BOXES).tensor()
    levels = torch.tensor([2, 0, 0, 2, 0, 2, 0])
    by_level, places = Regions(BOXES).split_by_level(levels, 3)
    assert [[len(boxes) for boxes in part.boxes] for part in by_level] == [[3, 0, 1], [0, 0, 0], [2, 0, 1]]
    assert torch.equal(torch.cat([part.tensor() for part in by_level])[places], boxes)
    assert torch.equal(by_level[0].rois()[:, 0], torch.tensor([0.0, 0, 0, 2]))
    invalid, _ = Regions(BOXES).split_by_level(torch.tensor([-(2**62), 9, 0, 0, 0, 0, 0]), 3)
    assert [len(part) for part in invalid] == [6, 0, 1]


def test_image_ids_follow_the_boxes():
    assert Regions(BOXES).image_ids().tolist() == [0] * 5 + [2] * 2
    assert Regions(BOXES).image_ids().dtype == torch.long
    assert len(Regions(BOXES)) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_keep_their_place_where_the_maps_are_in_half_precision(dtype):
    """The map holds the index of the column, so the mean over a box is the column of the box's centre."""
    maps = [torch.arange(256, dtype=dtype).expand(1, 2, 64, 256)]  # exact in both dtypes
    boxes = torch.tensor([[961.3, 101, 989.7, 129]])
    assert (boxes.to(dtype).float()[0, 0] - boxes[0, 0]).abs() > 0.04
    regions, expected = Regions([Boxes(boxes)]), (961.3 + 989.7) / 2 / 4 - 0.5
    pooler = ROIPooler(7, [1 / 4], 2, "ROIAlignV2")
    assert pool_in_full_precision(pooler, maps, regions).mean().item() == pytest.approx(expected, abs=1e-3)
    assert pool_all_levels(maps, [4], regions, (7, 7), 2).mean().item() == pytest.approx(expected, abs=1e-3)
