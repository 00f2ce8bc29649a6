"""Test InstaBoost in Detectron2's mapper, with a stand-in for the authors' package and with the package itself."""

import sys
import types

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image

from conftest import make_cfg, write_coco
from gdetkd.data import register_datasets
from gdetkd.data.instaboost import InstaBoostMapper, _run_lengths
from gdetkd.data.teacher_view import TEACHER_IMAGE, TeacherViewMapper
from gdetkd.data.train_loader import build_train_loader
from gdetkd.errors import GDetKDError
from gdetkd.random_state import random_state

SHIFT = 4


@pytest.fixture
def package(monkeypatch):
    """Replace the authors' package by a stand-in, and return it.

    The stand-in moves every object SHIFT pixels to the right, paints the image grey, and keeps its arguments in `seen`.
    """
    module = types.ModuleType("instaboostfast")
    module.seen = []

    class InstaBoostConfig:
        def __init__(self, **parameters):
            module.parameters = parameters

    def get_new_data(annotations, image, config):
        module.seen.append((annotations, image))
        x, y, w, h = annotations[0]["bbox"]
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[int(y) : int(y + h), int(x) + SHIFT : int(x + w) + SHIFT] = 1
        moved = {"size": list(mask.shape), "counts": _run_lengths(mask)}
        first = {**annotations[0], "bbox": [x + SHIFT, y, w, h], "segmentation": moved}
        return [first], np.full_like(image, [10, 20, 30])

    module.InstaBoostConfig, module.get_new_data = InstaBoostConfig, get_new_data
    monkeypatch.setitem(sys.modules, "instaboostfast", module)
    return module


@pytest.fixture
def sample(tmp_path):
    """Return an image in Detectron2's format with a crowd, and an object whose mask is a compressed run-length code."""
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(tmp_path / "a.png")
    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[10:30, 8:20] = 1
    common = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    annotations = [
        {**common, "bbox": [8, 10, 12, 20], "iscrowd": 0, "segmentation": mask_util.encode(mask)},
        {**common, "bbox": [40, 40, 10, 10], "iscrowd": 1, "segmentation": mask_util.encode(mask)},
    ]
    return {"file_name": str(tmp_path / "a.png"), "height": 64, "width": 64, "annotations": annotations}


def boosting_cfg(**changes):
    keys = {"INPUT.INSTABOOST.ENABLED": True, "INPUT.INSTABOOST.PROBABILITY": 1.0, "INPUT.RANDOM_FLIP": "none"}
    keys.update({"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask"})
    return make_cfg({**keys, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_objects_move_with_box_mask_and_image(package, sample):
    out = InstaBoostMapper(boosting_cfg())(sample)
    assert out["instances"].gt_boxes.tensor.tolist() == [[8 + SHIFT, 10, 20 + SHIFT, 30]]
    mask = out["instances"].gt_masks.tensor[0]
    assert mask.sum() == 12 * 20 and mask[10:30, 8 + SHIFT : 20 + SHIFT].all()
    assert out["image"].flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]


def test_the_package_sees_bgr_and_uncompressed_masks_without_crowds(package, sample):
    InstaBoostMapper(boosting_cfg())(sample)
    [(annotations, image)] = package.seen
    assert np.array_equal(image, np.asarray(Image.open(sample["file_name"]))[:, :, ::-1])
    assert len(annotations) == 1 and annotations[0]["bbox"] == [8, 10, 12, 20]
    counts = annotations[0]["segmentation"]["counts"]
    assert counts[0] == 8 * 64 + 10 and sum(counts) == 64 * 64


def test_the_students_channel_order_is_kept(package, sample):
    out = InstaBoostMapper(boosting_cfg(INPUT__FORMAT="RGB"))(sample)
    assert out["image"].flatten(1).unique(dim=1).tolist() == [[30], [20], [10]]


def test_a_larger_teacher_sees_the_same_boosted_image(package, sample):
    cfg = boosting_cfg()
    mapper = TeacherViewMapper(DatasetMapper(cfg, is_train=True), 2.0)
    out = InstaBoostMapper(cfg, mapper)(sample)
    assert out[TEACHER_IMAGE].flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]  # the boosted image's colour
    assert list(out[TEACHER_IMAGE].shape[1:]) == [2 * side for side in out["image"].shape[1:]]


def test_the_authors_defaults_are_passed_on(package, sample):
    InstaBoostMapper(boosting_cfg())
    assert package.parameters == {
        "action_candidate": ("normal", "horizontal", "skip"),
        "action_prob": (1.0, 0.0, 0.0),
        "scale": (0.8, 1.2),
        "dx": 15,
        "dy": 15,
        "theta": (-1, 1),
        "color_prob": 0.5,
        "heatmap_flag": False,
    }


@pytest.mark.parametrize("case", ["never", "no object"])
def test_an_image_that_is_not_augmented_is_mapped_as_by_detectron2(case, package, sample):
    if case == "no object":
        sample["annotations"] = []
    cfg = boosting_cfg(INPUT__INSTABOOST__PROBABILITY=0.0 if case == "never" else 1.0)
    boosted, plain = InstaBoostMapper(cfg)(sample), DatasetMapper(cfg, is_train=True)(sample)
    assert torch.equal(boosted["image"], plain["image"]) and not package.seen
    assert torch.equal(boosted["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)


def test_the_sample_itself_is_not_changed(package, sample):
    InstaBoostMapper(boosting_cfg())(sample)
    assert sample["annotations"][0]["bbox"] == [8, 10, 12, 20]


def test_an_object_without_a_mask_is_refused(package, sample):
    del sample["annotations"][0]["segmentation"]
    with pytest.raises(GDetKDError, match=r"a\.png has none.*INPUT\.INSTABOOST\.ENABLED"):
        InstaBoostMapper(boosting_cfg())(sample)


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "instaboostfast", None)
    with pytest.raises(GDetKDError, match=r"pip install instaboostfast"):
        InstaBoostMapper(boosting_cfg())


def test_the_training_loader_uses_instaboost(package, tmp_path):
    batch = next(iter(build_train_loader(boosting_cfg())))
    assert package.seen and all(sample["instances"].has("gt_masks") for sample in batch)
    write_coco(tmp_path, 4, name="boxes")
    entry = {"name": "boxes", "kind": "coco", "json": str(tmp_path / "boxes.json"), "images": str(tmp_path)}
    cfg = boosting_cfg(DATASETS__REGISTER=[entry], DATASETS__TRAIN=("boxes",))
    register_datasets(cfg)
    with pytest.raises(GDetKDError, match="7 of 7 objects have no mask, but INPUT.INSTABOOST.ENABLED is True"):
        build_train_loader(cfg)


def test_run_lengths_equal_those_of_pycocotools():
    for seed in range(20):
        mask = (np.random.default_rng(seed).random((7, 5)) < seed / 19).astype(np.uint8)
        code = mask_util.frPyObjects({"size": [7, 5], "counts": _run_lengths(mask)}, 7, 5)
        assert np.array_equal(mask_util.decode(code), mask)


def test_the_authors_package_moves_objects(sample):
    pytest.importorskip("instaboostfast")
    mapper = InstaBoostMapper(boosting_cfg())
    boxes = []
    for seed in range(10):
        with random_state((seed,)):
            out = mapper(sample)
        assert out["image"].shape == (3, 64, 64) and len(out["instances"]) == 1
        boxes.append(out["instances"].gt_boxes.tensor[0])
        inside = out["instances"].gt_masks.get_bounding_boxes().tensor[0]
        assert (inside - boxes[-1]).abs().max() <= 1
    assert len({tuple(box.tolist()) for box in boxes}) > 3
