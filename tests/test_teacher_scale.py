"""DISTILL.TEACHER.SCALE: the teacher sees the same augmented view at another resolution."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from conftest import ALL_LOSSES, make_cfg
from gdetkd import DistillTrainer
from gdetkd.data import build_train_loader
from gdetkd.data.teacher_view import TEACHER_IMAGE, TeacherViewMapper, at_scale
from gdetkd.errors import GDetKDError
from gdetkd.insight.probe import load_probe, look_at_objects
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher


@pytest.fixture
def photo(tmp_path):
    """A file of 96 x 128 random smooth pixels with one object."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 96), Image.BILINEAR).save(tmp_path / "photo.png")
    objects = [{"bbox": [40, 20, 60, 50], "bbox_mode": 1, "category_id": 0}]
    return {"file_name": str(tmp_path / "photo.png"), "height": 96, "width": 128, "annotations": objects}


def mapped(photo, augmentations, scale=None, seed=3):
    mapper = DatasetMapper(make_cfg({}), is_train=True)
    mapper.augmentations = T.AugmentationList(augmentations)
    random.seed(seed), np.random.seed(seed)
    return (mapper if scale is None else TeacherViewMapper(mapper, scale))(dict(photo))


def shrunk(image):
    """An image of even sides at half its size, by means over 2 x 2 pixels."""
    return torch.nn.functional.avg_pool2d(image.float(), 2)


AUGMENTATIONS = {
    "resize": [T.ResizeShortestEdge(32, 100)],
    "flip": [T.ResizeShortestEdge([24, 32], 100, "choice"), T.RandomFlip(1.0)],
    "crop before": [T.RandomCrop("absolute", (60, 80)), T.ResizeShortestEdge(30, 100), T.RandomFlip()],
    "crop after": [
        T.ResizeShortestEdge(32, 100),
        T.RandomCrop("absolute", (20, 24)),
        T.RandomFlip(vertical=True, horizontal=False),
    ],
    "pad": [T.ResizeShortestEdge(32, 100), T.FixedSizeCrop((40, 40))],
    "colours": [T.ResizeShortestEdge(32, 100), T.RandomBrightness(0.5, 0.9), T.RandomContrast(0.5, 1.5)],
    "none": [],
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_view_is_the_students_image_at_another_size(photo, name):
    plain, both = mapped(photo, AUGMENTATIONS[name]), mapped(photo, AUGMENTATIONS[name], 2.0)
    assert torch.equal(plain["image"], both["image"])  # the student's image does not change
    assert torch.equal(plain["instances"].gt_boxes.tensor, both["instances"].gt_boxes.tensor)
    view = both.pop(TEACHER_IMAGE)
    assert view.dtype == torch.uint8 and list(view.shape[1:]) == [2 * side for side in plain["image"].shape[1:]]
    difference = (shrunk(view) - plain["image"].float()).abs()
    # A contrast's mean depends on the pixels a little. An image mirrored or moved by a cell would differ by about 50.
    assert difference.mean() < (4 if name != "colours" else 10)


def test_the_view_has_the_details_of_the_original(photo):
    """A student of half the size, with a teacher at twice that: the teacher sees the file's own pixels."""
    view = mapped(photo, [T.ResizeShortestEdge(48, 100)], 2.0)[TEACHER_IMAGE]
    original = torch.as_tensor(read_image(photo["file_name"], "BGR").copy()).permute(2, 0, 1)
    assert torch.equal(view, original)
    assert torch.equal(at_scale(read_image(photo["file_name"], "BGR"), 2.0, (48, 64)), original)


def test_an_augmentation_that_cannot_be_repeated_is_named(photo):
    rotated = [T.ResizeShortestEdge(32, 100), T.RandomRotation([10, 20])]
    with pytest.raises(GDetKDError, match="TEACHER.SCALE is 2.0.*RotationTransform.*before the image is resized"):
        mapped(photo, rotated, 2.0)
    mapped(photo, rotated[::-1], 2.0)
    saturated = [T.ResizeShortestEdge(32, 100), T.RandomSaturation(0.5, 1.5)]
    with pytest.raises(GDetKDError, match="the augmentation RandomSaturation .*before the image is resized"):
        mapped(photo, saturated, 2.0)
    mapped(photo, saturated[::-1], 2.0)


def test_the_loader_adds_the_view_and_leaves_the_students_samples_alone(distill_cfg):
    plain, scaled, baseline = (
        next(iter(build_train_loader(distill_cfg(keys))))
        for keys in ({}, {"DISTILL.TEACHER.SCALE": 1.5}, {"DISTILL.TEACHER.SCALE": 1.5, "DISTILL.LOSSES": ()})
    )
    for one, two, three in zip(plain, scaled, baseline):
        assert TEACHER_IMAGE not in one and TEACHER_IMAGE not in three
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["image"], three["image"])
        assert list(two[TEACHER_IMAGE].shape[1:]) == [round(1.5 * side) for side in one["image"].shape[1:]]


@torch.no_grad()
def test_the_teacher_looks_at_scaled_regions_of_its_image(distill_cfg):
    cfg = distill_cfg({"DISTILL.TEACHER.SCALE": 2.0})
    (batch,) = [next(iter(build_train_loader(cfg)))]
    boxes = [inputs["instances"].gt_boxes for inputs in batch]
    needs = {"pooled", "levels", "embeddings", "logits", "deltas"}
    found = FrozenTeacher(cfg).look(batch, Regions(boxes), needs)
    plain = FrozenTeacher(distill_cfg({}))
    large = [{"image": inputs[TEACHER_IMAGE]} for inputs in batch]
    expected = plain.look(large, Regions(boxes).scaled(2.0), needs)
    for name in needs:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.strides == {name: stride / 2 for name, stride in expected.strides.items()}
    assert found.regions.boxes is boxes


def test_a_dense_teacher_labels_its_anchors_by_the_objects_in_its_own_pixels(pair_cfg):
    """The anchors of the teacher lie in its larger image."""
    (batch,) = [next(iter(build_train_loader(pair_cfg("retinanet-retinanet", {"DISTILL.TEACHER.SCALE": 2.0}))))]
    boxes = [inputs["instances"].gt_boxes for inputs in batch]
    labels = []
    for scale in (2.0, 1.0):
        teacher = FrozenTeacher(pair_cfg("retinanet-retinanet", {"DISTILL.TEACHER.SCALE": scale}))
        large = [{**inputs, "image": inputs[TEACHER_IMAGE]} for inputs in batch]
        features = teacher.extract(batch if scale == 2 else large)
        head = teacher.look_at(features, None, {"head"}).head
        objects = boxes if scale == 2 else Regions(boxes).scaled(2.0).boxes
        labels.append(head.label(objects, list(features.values())))
    assert torch.equal(labels[0], labels[1]) and (labels[0] == 1).any()


@pytest.mark.parametrize(
    "pair, losses", [("faster_rcnn-faster_rcnn", (*ALL_LOSSES, "ROIFI")), ("retinanet-fcos", ("SGFI", "CKD"))]
)
def test_pairs_train(pair_cfg, pair, losses):
    cfg = pair_cfg(pair, {"DISTILL.LOSSES": losses, "DISTILL.TEACHER.SCALE": 2.0})
    model = build_model(cfg).train()
    with EventStorage():
        terms = model(next(iter(build_train_loader(cfg))))
    sum(terms.values()).backward()
    assert all(torch.isfinite(term) for term in terms.values())


def test_losses_on_maps_match_levels_by_the_students_pixels(distill_cfg):
    """At scale 2 the teacher's strides 4 to 32 are 2 to 16 of the student's pixels."""
    model = build_model(distill_cfg({"DISTILL.LOSSES": ("GTMASK",), "DISTILL.TEACHER.SCALE": 2.0}))
    levels = [(level.stride, level.student, level.teacher) for level in model.losses["GTMASK"].levels]
    assert levels == [(4, "p2", "p3"), (8, "p3", "p4"), (16, "p4", "p5")]
    with pytest.raises(GDetKDError, match="no stride in common"):
        build_model(distill_cfg({"DISTILL.LOSSES": ("GTMASK",), "DISTILL.TEACHER.SCALE": 1.5}))


def test_dense_predictions_at_other_locations_are_refused(pair_cfg):
    with pytest.raises(GDetKDError, match="CLS compares dense predictions anchor by anchor"):
        build_model(pair_cfg("retinanet-retinanet", {"DISTILL.LOSSES": ("CLS",), "DISTILL.TEACHER.SCALE": 2.0}))


def test_bad_scales_and_samples_without_a_view_are_named(distill_cfg):
    with pytest.raises(GDetKDError, match="DISTILL.TEACHER.SCALE.*positive"):
        DistillTrainer(distill_cfg({"DISTILL.TEACHER.SCALE": 0.0}))
    teacher = FrozenTeacher(distill_cfg({"DISTILL.TEACHER.SCALE": 2.0}))
    with pytest.raises(GDetKDError, match="'teacher_image'.*TeacherViewMapper"):
        teacher.preprocess([{"image": torch.zeros(3, 64, 64)}])


def test_a_run_trains_shows_and_resumes(distill_cfg):
    keys = {"DISTILL.TEACHER.SCALE": 2.0, "SOLVER.MAX_ITER": 2, "DATASETS.TEST": ("tiny",), "DISTILL.INSIGHT.IMAGES": 2}
    trainer = DistillTrainer(distill_cfg(keys))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "2 times as large" in trainer.distiller.teacher.describe()["images"]
    probe = load_probe(trainer.cfg, trainer.distiller.teacher)
    assert look_at_objects(trainer.distiller, probe).teacher.shape[0] > 0
