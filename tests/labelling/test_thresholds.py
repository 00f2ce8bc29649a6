"""Test the thresholds of classes against a plain loop, and what happens to classes without objects."""

import logging
from dataclasses import astuple

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from gdetkd.errors import GDetKDError
from gdetkd.labelling.part import Found
from gdetkd.labelling.thresholds import ClassThreshold, Objects, choose_thresholds, fill_gaps, load_validation

CLASSES = 4  # the last one has no object


def random_image(rng):
    """Return an image with objects, and detections of which many are near an object."""
    count = int(rng.integers(0, 6))
    corners = rng.uniform(0, 60, (count, 2))
    gt_boxes = np.concatenate([corners, corners + rng.uniform(10, 30, (count, 2))], axis=1)
    gt_classes, crowds = rng.integers(0, CLASSES - 1, count), rng.random(count) < 0.2
    near = gt_boxes[rng.integers(0, count, 8)] if count else np.empty((0, 4))
    far = rng.uniform(0, 60, (3, 2))
    boxes = np.concatenate([near + rng.uniform(-6, 6, near.shape), np.concatenate([far, far + 15], axis=1)])
    classes, scores = rng.integers(0, CLASSES, len(boxes)), rng.integers(1, 20, len(boxes)) / 20
    order = np.argsort(-scores, kind="stable")
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)[order]
    found = Found("", 0, "", xywh.tolist(), scores[order].tolist(), classes[order].tolist(), 0)
    return found, Objects(torch.tensor(gt_boxes), torch.tensor(gt_classes), torch.tensor(crowds, dtype=torch.bool))


def overlap(a, b, over_a=False):
    """Return the IoU of two boxes xyxy, or the intersection over the area of the first."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0, width) * max(0, height)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return inside / (area_a if over_a else area_a + area_b - inside)


def count_at(pairs, label, threshold):
    """Return how many detections of a class are kept and right from a threshold on, and how many objects there are."""
    kept = right = total = 0
    for found, objects in pairs:
        own = [i for i, gt in enumerate(objects.classes.tolist()) if gt == label]
        free = [i for i in own if not objects.crowds[i]]
        crowds = [i for i in own if objects.crowds[i]]
        total += len(free)
        for (x, y, w, h), score, predicted in zip(found.boxes, found.scores, found.classes):
            if predicted != label or score < threshold:
                continue
            box, gt_boxes = (x, y, x + w, y + h), objects.boxes.tolist()
            best = max(free, key=lambda i: overlap(box, gt_boxes[i]), default=None)
            if best is not None and overlap(box, gt_boxes[best]) >= 0.5:
                free.remove(best)
                kept, right = kept + 1, right + 1
            elif not any(overlap(box, gt_boxes[i], over_a=True) >= 0.5 for i in crowds):
                kept += 1
    return kept, right, total


def test_objects_are_read_as_training_reads_them(tmp_path):
    """They are cut at the edge of the image, a file can have several entries, and case in class names may differ."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    boxes = ([30, 10, 50, 20], 0), ([5, 5, 9, 9], 1)
    dicts = [
        {
            "file_name": str(tmp_path / "a.png"),
            "image_id": index,
            "width": 40,
            "height": 30,
            "annotations": [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}],
        }
        for index, (box, category) in enumerate(boxes)
    ]
    DatasetCatalog.register("in_two_entries", lambda: dicts)
    MetadataCatalog.get("in_two_entries").set(thing_classes=["Cat", "dog"])
    validation = load_validation("in_two_entries", ("cat", "dog"))
    (objects,) = validation.objects.values()
    assert objects.boxes.tolist() == [[30, 10, 40, 20], [5, 5, 9, 9]] and objects.classes.tolist() == [0, 1]
    assert len(validation.images) == 1


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    pairs = [random_image(rng) for _ in range(12)]
    chosen = choose_thresholds(pairs, CLASSES)
    assert chosen[-1] is None
    for label in range(CLASSES - 1):
        best = None
        for threshold in (step / 20 for step in range(20, 0, -1)):
            kept, right, total = count_at(pairs, label, threshold)
            f1 = 2 * right / (kept + total)
            if kept and (best is None or f1 > best[3]):
                best = (threshold, right / kept, right / total, f1)
        assert astuple(chosen[label]) == pytest.approx(best if best and best[3] else (1.0, 0.0, 0.0, 0.0))


def test_a_class_without_objects_gets_the_median_with_a_warning(caplog):
    chosen = [ClassThreshold(0.2, 1.0, 1.0, 1.0), None, ClassThreshold(0.6, 0.5, 0.5, 0.5)]
    with caplog.at_level(logging.WARNING, "gdetkd"):
        filled = fill_gaps(chosen, ["cat", "dog", "owl"], [], "val")
    assert filled["dog"] == ClassThreshold(0.4) and filled["cat"] == chosen[0]
    assert "'val' has no object of dog" in caplog.text and "0.4" in caplog.text


def test_boxes_of_a_class_that_is_never_right_are_left_out(caplog):
    chosen = [ClassThreshold(0.2, 1.0, 1.0, 1.0), ClassThreshold(1.0, 0.0, 0.0, 0.0)]
    with caplog.at_level(logging.WARNING, "gdetkd"):
        assert fill_gaps(chosen, ["cat", "dog"], [], "val")["dog"].min_score == 1.0
    assert "No box of dog is right" in caplog.text


def test_mostly_wrong_boxes_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "gdetkd"):
        fill_gaps([ClassThreshold(0.2, 0.4, 1.0, 0.57)], ["cat"], [], "val")
    assert "more than half of the boxes of cat are wrong" in caplog.text


def test_no_right_box_at_all_is_an_error():
    with pytest.raises(GDetKDError, match="No box on 'val' is right"):
        fill_gaps([ClassThreshold(1.0, 0.0, 0.0, 0.0), None], ["cat", "dog"], [], "val")


def test_a_class_that_the_source_lacks_is_not_warned_of_here(caplog):
    with caplog.at_level(logging.WARNING, "gdetkd"):
        filled = fill_gaps([ClassThreshold(0.2, 1.0, 1.0, 1.0), None], ["cat", "dog"], ["dog"], "val")
    assert filled["dog"] == ClassThreshold(1.0) and not caplog.text
