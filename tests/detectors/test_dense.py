"""Regions, predictions and embeddings of dense detectors, against plain computations."""

import math
from itertools import product

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from conftest import FAMILIES, make_batch, make_cfg
from gdetkd.detectors import FCOS, build_adapter
from gdetkd.errors import GDetKDError
from gdetkd.recorder import Recorder
from gdetkd.regions import match_and_sample
from gdetkd.structures import Regions


def build(family, changes={}):
    arch, keys = FAMILIES[family]
    cfg = make_cfg({**keys, "MODEL.META_ARCHITECTURE": arch, **changes})
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if family == "fcos":
        torch.nn.init.normal_(model.head.bbox_pred.bias, 1.0, 0.2)
    return model, build_adapter(model, "student", cfg), cfg


def record(model, adapter, batch):
    with Recorder(adapter.points()) as calls, EventStorage():
        losses = model(batch)
    return calls, losses, adapter.observe(calls, batch)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_recording_and_decoding_leave_the_students_losses_alone(family):
    model, adapter, _ = build(family)
    with EventStorage():
        alone = model(make_batch())
    model, adapter, _ = build(family)
    _, recorded, outputs = record(model, adapter, make_batch())
    assert len(outputs.regions) > 0
    for name, loss in alone.items():
        assert torch.equal(loss, recorded[name]), name
    sum(recorded.values()).backward()  # fails if a tensor that it reads was changed


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_regions_are_the_students_own_predictions(family):
    """Compare each region's box, logits, deltas and embedding with the location that the region's source names."""
    model, adapter, _ = build(family)
    batch = make_batch()
    calls, _, outputs = record(model, adapter, batch)
    logits, deltas = calls["head"][0].output[:2]
    anchors = [boxes.tensor for boxes in model.anchor_generator(calls["head"][0].inputs[0])]
    number = model.anchor_generator.num_cell_anchors[0]
    boxes, images = outputs.regions.tensor(), outputs.regions.image_ids()
    for i, (image, (level, row, column, anchor)) in enumerate(zip(images, outputs.regions.sources)):
        width = logits[level].shape[-1]
        at = lambda maps, k: maps[level][image, anchor * k : (anchor + 1) * k, row, column]  # noqa: E731, B023
        assert torch.equal(outputs.logits[i], at(logits, 3)) and torch.equal(outputs.deltas[i], at(deltas, 4))
        assert torch.equal(outputs.embeddings[i], calls["tower"][level].output[image, :, row, column])
        box = model.box2box_transform.apply_deltas(
            outputs.deltas[i][None], anchors[level][None, (row * width + column) * number + anchor]
        )
        expected = Boxes(box.detach())
        expected.clip(batch[image]["image"].shape[-2:])
        torch.testing.assert_close(boxes[i], expected.tensor[0])
    assert outputs.embeddings.requires_grad and not boxes.requires_grad


def test_predictions_that_are_no_boxes_are_left_out():
    model, adapter, _ = build("retinanet")
    batch = make_batch()
    with Recorder(adapter.points()) as calls, EventStorage():
        model(batch)
    logits, deltas = calls["head"][0].output
    with torch.no_grad():
        logits[0][:] = float("nan")
        logits[1][:] = 60.0
        deltas[1][:, :, 0] = float("inf")
        deltas[2][:] = 1e6  # far outside: without area once clipped
    boxes = adapter.observe(calls, batch).regions.tensor()
    assert torch.isfinite(boxes).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    with torch.no_grad():
        for level in logits:
            level[:] = float("nan")
    assert len(adapter.observe(calls, batch).regions) == 0


def test_fcos_boxes_with_a_side_at_infinity_are_left_out():
    """Such boxes would have an area after clipping to the image."""
    model, adapter, _ = build("fcos")
    batch = make_batch()
    with Recorder(adapter.points()) as calls, EventStorage():
        model(batch)
    logits, deltas, _ = calls["head"][0].output
    with torch.no_grad():
        logits[0].fill_(9.0)  # the first level has the best scores
        deltas[0][:, 0] = float("inf")
    sources = adapter.observe(calls, batch).regions.sources
    assert len(sources) > 0 and (sources[:, 0] > 0).all()


def iou(a, b):
    width, height = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def plain_regions(model, calls, image, size, config):
    """Return (level, row, column, anchor) of the boxes of an image that are left after suppression, and those boxes."""
    maps, (logits, deltas, *centerness) = calls["head"][0].inputs[0], calls["head"][0].output
    anchors = [boxes.tensor for boxes in model.anchor_generator(maps)]
    number, classes = model.anchor_generator.num_cell_anchors[0], model.num_classes
    found = []
    for level, scores in enumerate(logits):
        height, width = scores.shape[-2:]
        for row, column, anchor in product(range(height), range(width), range(number)):
            class_logits = scores[image, anchor * classes : (anchor + 1) * classes, row, column]
            score = max(1 / (1 + math.exp(-float(logit))) for logit in class_logits)
            if centerness:
                score = math.sqrt(score / (1 + math.exp(-float(centerness[0][level][image, 0, row, column]))))
            index = (row * width + column) * number + anchor
            delta = deltas[level][image, anchor * 4 : anchor * 4 + 4, row, column].detach().float()
            box = model.box2box_transform.apply_deltas(delta[None].clone(), anchors[level][None, index])[0].tolist()
            centre = (anchors[level][index, :2] + anchors[level][index, 2:]) / 2
            found.append((-1.0 if math.isnan(score) else score, (level, row, column, anchor), box, centre.tolist()))
    found.sort(key=lambda candidate: -candidate[0])
    kept = []
    for score, source, box, centre in found[: config.PRE_NMS_TOPK]:
        box = [min(max(side, 0.0), float(size[k % 2])) for k, side in enumerate(box)]
        is_sized = all(box[k + 2] - box[k] > config.MIN_SIZE for k in (0, 1))
        if score < 0 or not is_sized or centre[0] >= size[0] or centre[1] >= size[1]:
            continue
        if all(iou(box, kept_box) <= config.NMS_THRESH for _, kept_box in kept):
            kept.append((source, box))
    return kept[: config.POST_NMS_TOPK]


@pytest.mark.parametrize("best, left", [(50, 10), (12, 100)])
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_regions_are_those_of_plain_loops(family, best, left):
    """Sampling takes all boxes here, so nothing is random. The scores of one level are not numbers."""
    keys = {"PRE_NMS_TOPK": best, "POST_NMS_TOPK": left, "NMS_THRESH": 0.3, "MIN_SIZE": 5.0}
    model, adapter, cfg = build(family, {f"DISTILL.REGIONS.{key}": value for key, value in keys.items()})
    batch = make_batch()
    with Recorder(adapter.points()) as calls, EventStorage():
        model(batch)
    with torch.no_grad():
        for predictions in calls["head"][0].output:
            for level in predictions:
                level.add_(0.7 * torch.randn_like(level))
        calls["head"][0].output[0][1].fill_(float("nan"))
    regions = adapter.observe(calls, batch).regions
    start = 0
    for image, inputs in enumerate(batch):
        height, width = inputs["image"].shape[-2:]
        expected = dict(plain_regions(model, calls, image, (width, height), cfg.DISTILL.REGIONS))
        boxes = regions.boxes[image].tensor
        sources = [tuple(source) for source in regions.sources[start : start + len(boxes)].tolist()]
        assert 0 < len(expected) <= min(best, left) and set(sources) == set(expected)
        torch.testing.assert_close(boxes, torch.tensor([expected[source] for source in sources]), rtol=1e-5, atol=1e-3)
        start += len(boxes)


def test_half_precision_predictions_are_decoded_in_full_precision():
    """bfloat16 is only exact to 2 pixels beyond pixel 256."""
    model, adapter, _ = build("fcos", {"MODEL.ANCHOR_GENERATOR.SIZES": SIZES})
    batch = make_batch(((64, 448),))
    with Recorder(adapter.points()) as calls, EventStorage():
        model(batch)
    with torch.no_grad():
        for predictions in calls["head"][0].output:
            predictions[:] = [level.add_(torch.randn_like(level)).to(torch.bfloat16) for level in predictions]
    all_anchors, predictions = anchors_in(calls), calls["head"][0].output
    boxes, anchors, sources, _ = adapter._decode_best(all_anchors, predictions)
    deltas = torch.stack(
        [predictions[1][level][0, :, row, column].float() for level, row, column, _ in sources[0].tolist()]
    )
    expected = model.box2box_transform.apply_deltas(deltas, anchors[0])
    assert (expected[:, 2] > 400).any()
    torch.testing.assert_close(boxes[0], expected, rtol=0, atol=1e-3)


def anchors_in(calls):
    return torch.cat([level.tensor for level in calls["anchors"][0].output])


def centres_of(model, sources):
    """Return the centres (N, 2), x and y in pixels, of the anchors that sources (N, 4) name."""
    offset, strides = model.anchor_generator.offset, model.anchor_generator.strides
    stride = torch.tensor([float(strides[level]) for level in sources[:, 0]])
    return torch.stack([(sources[:, 2] + offset) * stride, (sources[:, 1] + offset) * stride], dim=1)


@pytest.mark.parametrize("family, offset", [("retinanet", 0.0), ("retinanet", 0.5), ("fcos", 0.5)])
def test_a_prediction_in_the_padding_becomes_no_region(family, offset):
    """The best predictions lie beyond the right or the lower edge, and their clipped boxes would have an area."""
    model, adapter, _ = build(family, {"MODEL.ANCHOR_GENERATOR.OFFSET": offset})
    batch = make_batch(((64, 64), (64, 40), (40, 64)))
    with Recorder(adapter.points()) as calls, EventStorage():
        model(batch)
    logits, deltas = calls["head"][0].output[:2]
    sizes = torch.tensor([[inputs["image"].shape[2], inputs["image"].shape[1]] for inputs in batch])
    with torch.no_grad():
        for level, scores in enumerate(logits):
            scores.fill_(-4.0)
            deltas[level].fill_(8.0 if family == "fcos" else 0.0)  # FCOS: sides 8 strides away; RetinaNet: the anchors
            for row in range(scores.shape[2]):
                for column in range(scores.shape[3]):
                    centre = centres_of(model, torch.tensor([[level, row, column, 0]]))
                    scores[:, :, row, column] += 8.0 * (centre >= sizes).any(dim=1)[:, None]
    decoded = adapter._decode_best(anchors_in(calls), calls["head"][0].output)
    outputs = adapter.observe(calls, batch)
    centres = centres_of(model, outputs.regions.sources)
    assert (centres < sizes[outputs.regions.image_ids()]).all()
    assert all(len(boxes) for boxes in outputs.regions.boxes)
    for image in (1, 2):  # the predictions in the padding would have become regions
        boxes, _, sources, scores = (part[image] for part in decoded)
        outside = (centres_of(model, sources) >= sizes[image]).any(dim=1)
        clipped = Boxes(boxes.clone())
        clipped.clip((sizes[image, 1], sizes[image, 0]))
        assert clipped[outside].nonempty(threshold=1.0).sum() > 10
        assert scores[outside].min() > scores[~outside].max()


def test_samples_positives_and_negatives_one_to_three():
    _, _, cfg = build("retinanet")
    config = cfg.DISTILL.REGIONS
    config.BATCH_SIZE_PER_IMAGE = 16
    objects = torch.tensor([[0.0, 0, 20, 20]])
    near, far = objects.repeat(30, 1), objects.repeat(50, 1) + 100
    boxes = torch.cat([near, far])
    everything = torch.ones(80, dtype=torch.bool)
    sampled = match_and_sample(boxes, everything, objects, config)
    assert sampled[:30].sum() == 4 and sampled.sum() == 16
    assert match_and_sample(boxes, everything, objects[:0], config).sum() == 16  # no object: negatives alone
    assert match_and_sample(boxes[:0], everything[:0], objects, config).shape == (0,)
    few = torch.arange(80) % 20 == 0  # two near the object, two far from it
    assert torch.equal(match_and_sample(boxes, few, objects, config), few)


def test_every_box_is_sampled_equally_often():
    _, _, cfg = build("retinanet")
    config = cfg.DISTILL.REGIONS
    config.BATCH_SIZE_PER_IMAGE, config.POSITIVE_FRACTION = 8, 0.5
    objects = torch.tensor([[0.0, 0, 20, 20]])
    boxes = torch.cat([objects.repeat(10, 1), objects.repeat(20, 1) + 100])
    everything = torch.ones(30, dtype=torch.bool)
    times = sum(match_and_sample(boxes, everything, objects, config).float() for _ in range(2000))
    # 4 of 10 positives and 4 of 20 negatives each time; the tolerance is four standard deviations
    torch.testing.assert_close(times[:10], torch.full((10,), 800.0), rtol=0, atol=4 * (2000 * 0.4 * 0.6) ** 0.5)
    torch.testing.assert_close(times[10:], torch.full((20,), 400.0), rtol=0, atol=4 * (2000 * 0.2 * 0.8) ** 0.5)


def test_a_box_is_positive_from_the_threshold_on_with_any_object():
    _, _, cfg = build("retinanet")
    objects = torch.tensor([[0.0, 0, 20, 20], [300, 0, 320, 20]])
    half = torch.tensor([[300.0, 0, 320, 10]])  # IoU 0.5 with the second object, 0 with the first
    far = torch.tensor([[100.0, 100, 120, 120]]).repeat(50, 1)
    config = cfg.DISTILL.REGIONS
    config.BATCH_SIZE_PER_IMAGE, config.POSITIVE_FRACTION = 4, 1.0  # all positives, and negatives for the rest
    assert match_and_sample(torch.cat([far, half]), torch.ones(51, dtype=torch.bool), objects, config)[50]


SIZES = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]  # RetinaNet's default


SIDES = [9.0, 20.5, 31.0, 33.0, 55.0, 60.0, 65.0, 80.0, 130.0, 300.0, 390.0, 600.0, 1000.0]


@pytest.mark.parametrize("aspect", [1.0, 0.4, 3.0], ids="aspect{}".format)
@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        [[16], [24], [36], [54], [81]],
        [[20], [40], [45], [200], [900]],
        [[8, 32], [16, 64], [32, 128], [64, 256], [128, 512]],
    ],
    ids=["default", "uneven", "wide", "overlapping"],
)
def test_the_level_of_a_region_is_that_of_the_anchor_that_it_overlaps_most(sizes, aspect):
    """Detectron2 gives a RetinaNet's box to the anchor that it overlaps most."""
    model, adapter, _ = build("retinanet", {"MODEL.ANCHOR_GENERATOR.SIZES": sizes})
    boxes = [(side * aspect**0.5, side / aspect**0.5) for side in SIDES]

    def overlap(box, anchor):
        x1, y1, x2, y2 = anchor
        common = min(box[0], x2 - x1) * min(box[1], y2 - y1)
        return common / (box[0] * box[1] + (x2 - x1) * (y2 - y1) - common)

    cells = [level.tolist() for level in model.anchor_generator.cell_anchors]
    best = [max(range(5), key=lambda level: max(overlap(box, anchor) for anchor in cells[level])) for box in boxes]
    assert levels_of(adapter, boxes) == best and len(set(best)) > 3


@pytest.mark.parametrize("aspect", [1.0, 1.7, 3.0, 6.0])
def test_the_level_of_a_region_is_that_of_an_fcos_own_label_assignment(aspect):
    """Most locations that Detectron2 trains to find the box are on the level."""
    model, adapter, _ = build("fcos")
    boxes = [(11.0 * stride, 11.0 * stride / aspect) for stride in adapter.spec.strides.values()]
    boxes += [(height, width) for width, height in boxes]
    shapes = [torch.zeros(1, 1, 2048 // stride, 2048 // stride) for stride in adapter.spec.strides.values()]
    anchors = model.anchor_generator(shapes)
    found = []
    for width, height in boxes:
        box = torch.tensor([[1024.0 - width / 2, 1024 - height / 2, 1024 + width / 2, 1024 + height / 2]])
        target = Instances((2048, 2048), gt_boxes=Boxes(box), gt_classes=torch.zeros(1, dtype=torch.long))
        labels = model.label_anchors(anchors, [target])[0][0].split([len(level) for level in anchors])
        counts = [int((level != model.num_classes).sum()) for level in labels]
        found.append(counts.index(max(counts)))
    assert levels_of(adapter, boxes) == found == [0, 1, 2, 3, 4] * 2
    assert levels_of(adapter, squares(120.0, 130.0, 9.0, 4000.0)) == [0, 1, 0, 4]


def levels_of(adapter, boxes):
    """Return the level of a region of each width and height, after checking that pooling and embedding use it, too."""
    regions = Regions([Boxes(torch.tensor([[10.0, 10, 10 + width, 10 + height] for width, height in boxes]))])
    maps = {name: torch.full((1, 1, 200, 200), float(level)) for level, name in enumerate(adapter.feature_names)}
    outputs = adapter.look(maps, regions, {"levels", "pooled"})
    levels = outputs.levels
    embeddings = adapter._embed_at_centres(list(maps.values()), regions, levels)
    torch.testing.assert_close(embeddings[:, 0], levels.float())
    torch.testing.assert_close(outputs.pooled[:, 0, 0, 0], levels.float())
    return levels.tolist()


def squares(*sides):
    return [(side, side) for side in sides]


def test_anchors_that_do_not_grow_are_reported(caplog):
    model, student, cfg = build("retinanet", {"MODEL.ANCHOR_GENERATOR.SIZES": [[16]]})
    assert not caplog.text
    teacher = build_adapter(model, "teacher", cfg)
    assert "do not grow from level to level: 16, 16, 16, 16, 16 pixels" in caplog.text
    boxes = squares(20.0, 40.0, 70.0)
    assert levels_of(teacher, boxes) == levels_of(student, boxes) == [0, 1, 2]


def test_a_dense_detector_can_leave_out_levels():
    keys = {"MODEL.RETINANET.IN_FEATURES": ["p3", "p5", "p7"], "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [128], [512]]}
    _, adapter, _ = build("retinanet", keys)
    assert levels_of(adapter, squares(60.0, 130.0, 600.0)) == [0, 1, 2]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_a_teachers_embedding_is_the_towers_feature_at_the_centre(offset):
    """The maps hold coordinates, different for each image. Anchors lie at (i + offset) strides."""
    keys = {"MODEL.ANCHOR_GENERATOR.SIZES": SIZES, "MODEL.ANCHOR_GENERATOR.OFFSET": offset}
    _, adapter, _ = build("retinanet", keys)
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    towers = [torch.stack([torch.stack([y, x]), torch.stack([y, x]) + 100]) for _ in range(5)]
    regions = Regions([Boxes(torch.tensor([[40.0, 80, 80, 130]])), Boxes(torch.tensor([[100.0, 50, 190, 150]]))])
    first, second = adapter._embed_at_centres(towers, regions, torch.tensor([0, 1]))
    torch.testing.assert_close(first, torch.tensor([105 / 8, 60 / 8]) - offset)  # level 0, stride 8
    torch.testing.assert_close(second, 100 + torch.tensor([100 / 16, 145 / 16]) - offset)  # level 1, stride 16


def test_a_teachers_embedding_is_of_the_same_place_in_half_precision():
    _, adapter, _ = build("retinanet", {"MODEL.ANCHOR_GENERATOR.SIZES": SIZES})
    columns = torch.arange(200, dtype=torch.bfloat16).expand(1, 1, 40, 200)
    regions = Regions([Boxes(torch.tensor([[961.0, 80, 1002, 121]]))])
    found = adapter._embed_at_centres([columns] * 5, regions, torch.tensor([0]))
    assert found.item() == pytest.approx((961 + 1002) / 2 / 8, abs=1e-3)


def test_fcos_from_a_config_is_detectron2s():
    model, _, cfg = build("fcos")
    keys = {
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.FCOS.NORM": "GN",
        "MODEL.BACKBONE.NAME": "build_fcos_resnet_fpn_backbone",
    }
    with_norm, _, _ = build("fcos", keys)
    assert with_norm.backbone.top_block.in_feature == "p5" and model.backbone.top_block.in_feature == "res5"
    assert any(isinstance(module, torch.nn.GroupNorm) for module in with_norm.head.modules())
    assert isinstance(model, FCOS.__mro__[1]) and model.num_classes == 3
    with EventStorage():
        losses = model(make_batch(boxes_each=0))
        mixed = model([make_batch()[0], make_batch(boxes_each=0)[1]])
    assert losses["loss_fcos_loc"] == 0 and mixed["loss_fcos_loc"] > 0


def test_level_scales_multiply_the_deltas_of_their_level_alone():
    plain, _, _ = build("fcos")
    scaled, _, _ = build("fcos", {"MODEL.FCOS.LEVEL_SCALES": True})
    scaled.load_state_dict({**plain.state_dict(), "head.level_scales": torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5])})
    maps = [torch.randn(1, 8, size, size) for size in (8, 4, 2, 1, 1)]
    (logits, deltas, centerness), found = plain.head(maps), scaled.head(maps)
    assert all(map(torch.equal, logits + centerness, found[0] + found[2]))
    for level, before, after in zip(range(5), deltas, found[1]):
        torch.testing.assert_close(after, before * scaled.head.level_scales[level])
    with EventStorage():
        scaled(make_batch())["loss_fcos_loc"].backward()
    assert scaled.head.level_scales.grad.abs().max() > 0


def test_mmdetections_retinanet_pyramid_has_no_relu_before_p7():
    before, _, _ = build("retinanet")
    after, _, _ = build("retinanet", {"MODEL.BACKBONE.NAME": "build_mmdet_retinanet_resnet_fpn_backbone"})
    after.load_state_dict(before.state_dict())
    image = torch.randn(1, 3, 64, 64)
    maps, plain = before.eval().backbone(image), after.eval().backbone(image)
    assert all(torch.equal(maps[name], plain[name]) for name in ("p3", "p4", "p5", "p6"))
    assert not torch.equal(maps["p7"], plain["p7"])
    torch.testing.assert_close(plain["p7"], after.backbone.top_block.p7(plain["p6"]))


def test_a_detector_that_reads_one_map_has_no_pyramid():
    with pytest.raises(GDetKDError, match="student has no FPN"):
        build("retinanet", {"MODEL.RETINANET.IN_FEATURES": ["p4"], "MODEL.ANCHOR_GENERATOR.SIZES": [[32]]})


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
@torch.no_grad()
def test_a_teacher_runs_its_classification_tower_once(family):
    model, adapter, _ = build(family)
    model.eval()
    images = model.preprocess_image(make_batch())
    features = model.backbone(images.tensor)
    regions = Regions([Boxes(torch.tensor([[4.0, 4, 40, 40]]))] * len(images))
    with Recorder({"tower": model.head.cls_subnet}) as calls:
        both = adapter.look(features, regions, {"embeddings"})
    levels = len(calls["tower"])
    regions = Regions(regions.boxes, torch.zeros(len(images), 4, dtype=torch.long))
    with Recorder({"tower": model.head.cls_subnet}) as calls:
        all_at_once = adapter.look(features, regions, {"embeddings", "logits", "deltas"})
    assert len(calls["tower"]) == levels == len(adapter.spec.strides)
    assert torch.equal(both.embeddings, all_at_once.embeddings)
