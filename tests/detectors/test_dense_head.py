"""A dense head in two parts gives the predictions of the whole head."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from torchvision.ops import box_iou

from conftest import FAMILIES, make_cfg
from gdetkd.detectors.dense_head import DenseHead
from gdetkd.recorder import Recorder

SIZES = (8, 4, 2, 1, 1)
GT_BOXES = [Boxes(torch.tensor([[4.0, 6.0, 19.0, 22.0], [20.0, 20.0, 60.0, 50.0]])), Boxes(torch.zeros(0, 4))]


@pytest.fixture(params=["retinanet", "fcos", "fcos with level scales"])
def model(request):
    family, _, has_scales = request.param.partition(" ")
    architecture, keys = FAMILIES[family]
    convs = {"MODEL.RETINANET.NUM_CONVS": 2, "MODEL.FCOS.NUM_CONVS": 2, "MODEL.FCOS.LEVEL_SCALES": bool(has_scales)}
    model = build_model(make_cfg({"MODEL.META_ARCHITECTURE": architecture, **keys, **convs}))
    if has_scales:
        torch.nn.init.uniform_(model.head.level_scales, 0.5, 2.0)
    return model


def maps():
    return [torch.randn(2, 8, size, size) for size in SIZES]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_both_parts_together_are_the_head(model, k):
    head, features = DenseHead(model), maps()
    logits, deltas = head.finish(head.start(features, k), k)
    expected = model.head(features)
    torch.testing.assert_close(logits, torch.cat([permute_to_N_HWA_K(level, 3) for level in expected[0]], dim=1))
    torch.testing.assert_close(deltas, torch.cat([permute_to_N_HWA_K(level, 4) for level in expected[1]], dim=1))


def test_recorded_towers_are_what_the_first_part_gives(model):
    head, features = DenseHead(model), maps()
    with Recorder({"head": model.head, **head.points()}) as calls:
        model.head(features)
    towers = head.towers(calls)
    assert head.channels == (8, 8) and [len(tower) for tower in towers] == [3, 3]
    for k in range(3):
        for tower, expected in zip(towers, head.start(features, k)):
            assert len(tower[k]) == len(SIZES)
            assert all(torch.equal(a, b) for a, b in zip(tower[k], expected))


def fcos_label(x, y, stride, sizes, radius):
    """Label a location as FCOS does: in an object, near its centre, and far from its edges by `sizes`."""
    for x1, y1, x2, y2 in GT_BOXES[0].tensor.tolist():
        sides = (x - x1, y - y1, x2 - x, y2 - y)
        distance = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
        if min(sides) > 0 and sizes[0] < max(sides) < sizes[1] and distance < radius * stride:
            return 1.0
    return 0.0


def test_labels_are_the_detectors_own(model):
    labels = DenseHead(model).label(GT_BOXES, maps())
    if hasattr(model.head, "ctrness"):
        expected = []
        for level, anchors in enumerate(model.anchor_generator(maps())):
            stride = 8 * 2**level
            sizes = (4 * stride if level else 0, math.inf if level == len(SIZES) - 1 else 8 * stride)
            centers = anchors.get_centers().tolist()
            expected += [fcos_label(x, y, stride, sizes, model.center_sampling_radius) for x, y in centers]
        assert labels[0].tolist() == expected and 0 < sum(expected) < len(expected) and not labels[1].any()
        return
    anchors = Boxes.cat(list(model.anchor_generator(maps())))
    _, matched = model.anchor_matcher(box_iou(GT_BOXES[0].tensor, anchors.tensor))
    assert torch.equal(labels[0], matched.float()) and not labels[1].any()
    assert set(labels[0].tolist()) == {-1.0, 0.0, 1.0}


def test_labels_do_not_depend_on_classes_and_find_objects(model):
    labels = DenseHead(model).label(GT_BOXES, maps())
    assert labels.shape[0] == 2 and (labels[0] == 1).sum() > 0 and (labels[1] == 1).sum() == 0


def test_boxes_are_decoded_as_the_detector_does_and_deltas_stay(model):
    features = maps()
    anchors = Boxes.cat(list(model.anchor_generator(features))).tensor
    deltas = torch.randn(2, len(anchors), 4)
    before = deltas.clone()
    boxes = DenseHead(model).decode(deltas, features)
    assert torch.equal(before, deltas)
    for image in range(2):
        torch.testing.assert_close(boxes[image], model.box2box_transform.apply_deltas(before[image].clone(), anchors))
