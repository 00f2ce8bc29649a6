"""A converted detector computes what mmdetection's detector computes, and takes every tensor of the file."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from gdetkd import add_gdetkd_config
from gdetkd.config_file import merge_config_file
from gdetkd.mmdetection import convert, write
from gdetkd.mmdetection.tensors import convert_tensors
from gdetkd.teacher import load_weights
from mmdet_configs import CAFFE, RGB, config_2x, config_3x, fcos, retinanet, two_stage
from mmdet_reference import Detector, randomize

NAMES = ("dog", "cat", "bird", "fish", "bee")
IMAGE = (96, 320)  # p7 is larger than a pixel, which GroupNorm needs
DETECTORS = {
    "faster_rcnn": two_stage("FasterRCNN"),
    "faster_rcnn in caffe style": two_stage("FasterRCNN", style="caffe"),
    "faster_rcnn with two sizes of anchors": two_stage("FasterRCNN", scales=(4, 8)),
    "mask_rcnn with a ResNeXt": two_stage("MaskRCNN", depth=101),
    "cascade_rcnn": two_stage("CascadeRCNN"),
    "retinanet": retinanet(),
    "retinanet with a ResNet-18": retinanet(depth=18, base=64),
    "fcos": fcos(),
    "fcos without biases": fcos(conv_bias=False),
}


@pytest.fixture(params=DETECTORS)
def pair(request, tmp_path):
    """Return mmdetection's detector and the converted one, both in eval mode. 2.x and 3.x configs take turns."""
    settings = DETECTORS[request.param]
    is_3x, images = "with" in request.param, CAFFE if settings["backbone"]["style"] == "caffe" else RGB
    original = randomize(Detector(settings))
    text = (config_3x if is_3x else config_2x)(settings, images)
    meta = {"cfg": text, "dataset_meta": {"classes": NAMES}} if is_3x else {"config": text, "CLASSES": NAMES}
    torch.save({"meta": meta, "state_dict": original.state_dict()}, tmp_path / "mmdet.pth")
    config = write(convert(str(tmp_path / "mmdet.pth")), tmp_path / "converted.pth")
    cfg = get_cfg()
    add_gdetkd_config(cfg)
    merge_config_file(cfg, str(config))
    cfg.MODEL.DEVICE = "cpu"
    converted = build_model(cfg).eval()
    load_weights(converted, cfg.MODEL.WEIGHTS)  # an error if a tensor stays unloaded
    return original, converted, cfg, images


@torch.no_grad()
def test_all_that_the_detector_computes_before_nms(pair):
    original, converted, cfg, images = pair
    bgr = torch.randint(256, (3, *IMAGE)).to(torch.uint8)
    pixels = bgr.flip(0) if images["to_rgb"] else bgr
    normalized = (pixels - torch.tensor(images["mean"])[:, None, None]) / torch.tensor(images["std"])[:, None, None]
    inputs = converted.preprocess_image([{"image": pixels}]).tensor
    assert cfg.INPUT.FORMAT == ("RGB" if images["to_rgb"] else "BGR")
    close(inputs, normalized[None])

    levels = original.pyramid(inputs)
    maps = list(converted.backbone(inputs).values())
    assert len(maps) == len(levels) == 5
    for level, found in zip(levels, maps):
        close(found, level)
    if hasattr(original, "rpn_head"):
        compare_proposals(original.rpn_head(levels), converted.proposal_generator, maps)
        compare_boxes(original.roi_head, converted.roi_heads, levels)
    else:
        compare_dense(original.bbox_head(levels), converted, maps)


def test_a_convolution_without_a_bias_gets_one_of_zero():
    """GroupNorm takes a bias that is the same in all channels away, so the values above do not show this."""
    settings = fcos(conv_bias=False)
    tensors = convert_tensors(Detector(settings).state_dict(), settings)
    towers = {name: tensor for name, tensor in tensors.items() if re.search(r"_subnet\.[03]\.bias$", name)}
    assert len(towers) == 4 and not any(bias.any() for bias in towers.values())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def same_rows(found, expected):
    """Compare boxes with logits whose order may differ: both are sorted by their first logit."""
    (boxes, logits), (expected_boxes, expected_logits) = found, expected
    order, expected_order = logits[:, 0].argsort(), expected_logits[:, 0].argsort()
    close(logits[order], expected_logits[expected_order])
    # The order of equal logits is open, so compare boxes where neighbours differ.
    value = expected_logits[expected_order, 0]
    gaps = torch.cat([torch.tensor([1.0]), value.diff(), torch.tensor([1.0])])
    is_alone = torch.minimum(gaps[1:], gaps[:-1]) > 1e-4 * float(value.abs().max())
    assert is_alone.sum() > 100
    close(boxes[order][is_alone], expected_boxes[expected_order][is_alone])


def compare_proposals(expected, generator, maps):
    logits, deltas = generator.rpn_head(maps)
    anchors = generator.anchor_generator(maps)
    logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
    deltas = [level.view(1, -1, 4, *level.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2) for level in deltas]
    boxes = generator._decode_proposals(anchors, deltas)
    same_rows((torch.cat(boxes, dim=1)[0], torch.cat(logits, dim=1)[0][:, None]), expected)


def compare_boxes(original, converted, levels):
    corner = torch.rand(60, 2) * 60
    boxes = torch.cat([corner, corner + 4 + torch.rand(60, 2) ** 3 * 700], dim=1)
    proposals = [Instances((800, 800), proposal_boxes=Boxes(boxes))]
    maps = levels[:4]
    stages = [original.bbox_head] if not isinstance(original.bbox_head, torch.nn.ModuleList) else original.bbox_head
    for stage, head in enumerate(stages):
        pooled = converted.box_pooler(maps, [Boxes(boxes)])
        if len(stages) > 1:
            predictor, features = converted.box_predictor[stage], converted.box_head[stage](pooled)
        else:
            predictor, features = converted.box_predictor, converted.box_head(pooled)
        predictions = predictor(features)
        logits, decoded = head(levels, boxes)
        close(predictions[0], logits)
        close(predictor.predict_boxes(predictions, proposals)[0], decoded)
    if original.mask_head:
        pooled = converted.mask_pooler(maps, [Boxes(boxes)])
        close(converted.mask_head.layers(pooled), original.mask_head(levels, boxes))


def compare_dense(expected, converted, maps):
    predictions = converted.head(maps)
    anchors = torch.cat([boxes.tensor for boxes in converted.anchor_generator(maps)])
    counts = [converted.num_classes, 4, *[1] * (len(predictions) - 2)]
    flat = converted._transpose_dense_predictions(predictions, counts)
    logits, deltas, *centerness = [torch.cat(levels, dim=1)[0] for levels in flat]
    boxes = converted.box2box_transform.apply_deltas(deltas, anchors)
    same_rows((boxes, torch.cat([logits, *centerness], dim=1)), expected)
