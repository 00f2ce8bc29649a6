"""The losses on whole maps apply their functions to each level, with the keys of their nodes."""

import pytest
import torch
from detectron2.structures import Boxes

from conftest import make_cfg
from gdetkd.losses import (
    CWD,
    FGFI,
    FITNET,
    GTMASK,
    PKD,
    channel_wise_distillation,
    fine_grained_imitation,
    ground_truth_mask_imitation,
    pearson_imitation,
    whole_map_imitation,
)
from gdetkd.losses.fgfi import near_object_cells, place_anchors
from gdetkd.losses.gt_mask import object_mask
from gdetkd.structures import DetectorOutputs, DetectorSpec

STRIDES = {"p2": 4, "p3": 8}
SIZES = {"p2": (6, 5), "p3": (3, 3)}
ANCHORS = {"p2": ((-4.0, -4.0, 4.0, 4.0),), "p3": ((-8.0, -8.0, 8.0, 8.0),)}
SPEC = DetectorSpec(4, STRIDES, (7, 7), 6, 3, (10.0, 10.0, 5.0, 5.0), location_anchors=ANCHORS, anchor_offset=0.5)
BOXES = [torch.tensor([[2.0, 2.0, 11.0, 9.0]]), torch.tensor([[0.0, 5.0, 7.0, 15.0], [9.0, 1.0, 14.0, 4.0]])]


def outputs():
    maps = {name: torch.randn(2, 4, *size) for name, size in SIZES.items()}
    return DetectorOutputs(maps, STRIDES, gt_boxes=[Boxes(boxes) for boxes in BOXES])


def near_masks(factor):
    anchors = [place_anchors(torch.tensor(ANCHORS[name]), STRIDES[name], 0.5, SIZES[name]) for name in STRIDES]
    by_image = [near_object_cells(anchors, boxes, factor) for boxes in BOXES]
    return [torch.stack(masks) for masks in zip(*by_image)]


def object_masks():
    return [object_mask(BOXES, STRIDES[name], SIZES[name]) for name in STRIDES]


@pytest.mark.parametrize(
    "loss, keys, expected",
    [
        (PKD, {}, lambda s, t: sum(map(pearson_imitation, s, t))),
        (CWD, {"TEMPERATURE": 2.5}, lambda s, t: sum(channel_wise_distillation(a, b, 2.5) for a, b in zip(s, t))),
        (FITNET, {}, lambda s, t: sum(map(whole_map_imitation, s, t)) / 2),
        (GTMASK, {}, lambda s, t: ground_truth_mask_imitation(s, t, object_masks())),
        (FGFI, {"IOU_FACTOR": 0.3}, lambda s, t: fine_grained_imitation(s, t, near_masks(0.3))),
    ],
)
def test_the_term_is_that_of_the_adapted_maps(loss, keys, expected):
    module = loss(make_cfg({f"DISTILL.{loss.__name__}.{key}": value for key, value in keys.items()}), SPEC, SPEC)
    student, teacher = outputs(), outputs()
    with torch.no_grad():
        adapted = [adapter(maps) for adapter, maps in zip(module.adapters, student.pyramid.values())]
        value = expected(adapted, list(teacher.pyramid.values()))
        torch.testing.assert_close(module(student, teacher), value)
    assert value > 0


def test_the_masks_above_differ_by_level_and_by_key():
    first, second = (mask.float().mean().item() for mask in object_masks())
    assert first > 0 and second > 0 and first != second
    assert any(not torch.equal(low, high) for low, high in zip(near_masks(0.3), near_masks(0.5)))
