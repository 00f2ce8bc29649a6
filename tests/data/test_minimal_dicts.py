"""A dataset that is registered in Python may have only the keys that Detectron2 requires for training."""

import io
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from conftest import NUM_CLASSES
from gdetkd.data import build_train_loader
from gdetkd.data.clean import without_bad_images
from gdetkd.engine import DistillTrainer
from gdetkd.engine.check import Check
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.errors import GDetKDError
from gdetkd.insight.probe import load_probe

CLASSES = [f"class{number}" for number in range(NUM_CLASSES)]
REMOTE = "minimal://"


@pytest.fixture
def register(tmp_path):
    """Return a function that registers eight images as "minimal". The first four are wider than high."""

    def make(prefix=str(tmp_path) + "/", classes=CLASSES, **keys):
        for index in range(8):
            size = (80, 64) if index < 4 else (64, 80)
            pixels = np.random.default_rng(index).integers(0, 255, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        annotation = {"bbox": [5, 5, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
        DatasetCatalog.register(
            "minimal",
            lambda: [{"file_name": f"{prefix}{i}.png", "annotations": [dict(annotation)], **keys} for i in range(8)],
        )
        if classes:
            MetadataCatalog.get("minimal").set(thing_classes=classes)

    return make


@pytest.fixture
def remote(tmp_path):
    """Make "minimal://0.png" a remote image, which Detectron2 fetches. Return the prefix."""

    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return [REMOTE]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return io.BytesIO((tmp_path / path[len(REMOTE) :]).read_bytes())

    PathManager.register_handler(Handler(), allow_override=True)
    return REMOTE


def is_wide(sample):
    return sample["image"].shape[2] > sample["image"].shape[1]


def batches_of(cfg, count=12):
    stream = iter(build_train_loader(cfg))
    return [next(stream) for _ in range(count)]


def test_a_minimal_dataset_is_trained_on_and_checked(register, distill_cfg):
    register()
    cfg = distill_cfg({"DATASETS.TRAIN": ("minimal",), "DISTILL.TEACHER.MIN_AP": -1.0})
    trainer = DistillTrainer(cfg)
    trainer.train()
    assert trainer.iter == cfg.SOLVER.MAX_ITER
    check = Check(cfg, images=4)
    text = check.run()
    assert "Teacher on 4 images of minimal, 3 classes" in text and not check.unknown, text


def test_paths_may_be_objects_and_classes_need_no_names(register, distill_cfg, tmp_path):
    register(classes=None)
    dicts = [{**image, "file_name": Path(image["file_name"])} for image in DatasetCatalog.get("minimal")]
    DatasetCatalog.remove("minimal")
    DatasetCatalog.register("minimal", lambda: dicts)
    check = Check(distill_cfg({"DATASETS.TRAIN": ("minimal",), "DISTILL.LOSSES": ("SGFI",)}), images=4)
    check.run()
    (unknown,) = check.unknown
    assert "'minimal' does not name its classes" in unknown


def test_images_are_grouped_by_the_size_in_their_header(register, distill_cfg):
    register()
    for batch in batches_of(distill_cfg({"DATASETS.TRAIN": ("minimal",)})):
        assert len({is_wide(sample) for sample in batch}) == 1


def test_an_image_that_exif_turns_has_the_turned_size(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 80)).save(tmp_path / "turned.jpg", exif=exif)
    annotated = {"file_name": str(tmp_path / "turned.jpg"), "height": 64}
    for sample in ({"file_name": annotated["file_name"]}, annotated):
        before = dict(sample)
        ((with_size,), _) = without_bad_images([sample], 0, "mine")
        assert (with_size["width"], with_size["height"]) == (80, 64) and sample == before


def test_remote_images_without_a_size_are_one_group(register, remote, distill_cfg, caplog):
    """Their headers are not fetched at the start, so wide and high images share batches."""
    register(prefix=remote)
    cfg = distill_cfg({"DATASETS.TRAIN": ("minimal",)})
    with caplog.at_level("INFO"):
        batches = batches_of(cfg)
    assert "minimal: 8 images are remote and have no width and height" in caplog.text
    assert {is_wide(sample) for batch in batches for sample in batch} == {True, False}
    assert any(len({is_wide(sample) for sample in batch}) == 2 for batch in batches)
    assert batches[0][0]["width"] in (64, 80)  # the size is known after the image was fetched


def test_remote_images_are_checked(register, remote, distill_cfg):
    register(prefix=remote)
    check = Check(distill_cfg({"DATASETS.TRAIN": ("minimal",)}), images=4)
    assert "Teacher on 4 images of minimal" in check.run() and not check.unknown


@pytest.mark.parametrize(
    "keys, classes, lacks",
    [
        ({}, CLASSES, "no height and no image_id and no width"),
        ({"width": 80, "height": 64}, CLASSES, "no image_id"),
        ({"image_id": 1}, CLASSES, "no height and no width"),
        ({"image_id": 1, "width": 80, "height": 64}, None, "does not name its classes"),
    ],
)
def test_keys_that_an_evaluation_needs_are_required_before_training(register, distill_cfg, keys, classes, lacks):
    register(classes=classes, **keys)
    with pytest.raises(GDetKDError, match=f"'minimal' cannot be evaluated on.*{lacks}"):
        check_datasets(distill_cfg({"DATASETS.TEST": ("minimal",)}))


def test_images_with_one_id_are_refused_in_an_evaluation(register, distill_cfg):
    register(image_id=7, width=80, height=64)
    with pytest.raises(GDetKDError, match="'minimal' cannot.*0.png' and .*1.png' have the same image_id 7.*its own"):
        check_datasets(distill_cfg({"DATASETS.TEST": ("minimal",)}))


def test_a_probe_needs_class_names(register, distill_cfg):
    register(classes=None)
    with pytest.raises(GDetKDError, match="'minimal' has no class names"):
        load_probe(distill_cfg({"DATASETS.TEST": ("minimal",)}), teacher=None)
