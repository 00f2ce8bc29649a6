"""Unusual images load correctly. Faulty images are left out with a count, or an error names them."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import read_image
from PIL import Image
from test_clean import BOX, dataset

from gdetkd import DistillTrainer
from gdetkd.data import build_train_loader
from gdetkd.data.clean import BadImages, find_bad_images
from gdetkd.engine.dataset_checks import check_datasets
from gdetkd.errors import GDetKDError


def photograph(width=64, height=48):
    """Make an image that shows every turn and every swap of channels.

    It is bright on the left and dark on the right, red in the upper half and blue in the lower half.
    """
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = pixels[height // 2 :, :, 2] = np.linspace(250, 20, width).astype(np.uint8)
    return Image.fromarray(pixels)


def mean_error(image, reference):
    return np.abs(image.astype(float) - np.asarray(reference.convert("RGB"), float)).mean()


@pytest.mark.parametrize(
    "turn", [None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
)
def test_images_are_turned_as_exif_says(tmp_path, turn):
    upright, path = photograph(), tmp_path / "x.jpg"
    exif = Image.Exif()
    undo = {Image.Transpose.ROTATE_90: 6, Image.Transpose.ROTATE_180: 3, Image.Transpose.ROTATE_270: 8}
    if turn is not None:
        exif[274] = undo[turn]
    (upright if turn is None else upright.transpose(turn)).save(path, exif=exif, quality=95)
    assert find_bad_images([{"file_name": str(path), "width": 64, "height": 48}], whole=True) == {}
    assert mean_error(read_image(str(path), "RGB"), upright) < 6


@pytest.mark.parametrize("orientation, is_bad", [(0, False), (1, False), (3, True), (6, True), (9, False)])
def test_a_turned_tiff_is_bad_because_it_would_be_turned_twice(tmp_path, orientation, is_bad):
    exif = Image.Exif()
    exif[274] = orientation
    photograph().save(tmp_path / "x.tif", exif=exif)
    faults = find_bad_images([{"file_name": str(tmp_path / "x.tif")}])
    assert [fault.endswith("save it upright") for fault in faults.values()] == [True] * is_bad


@pytest.mark.parametrize(
    "mode, ending", [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "png")]
)
def test_images_of_other_modes_load_as_a_viewer_shows_them(tmp_path, mode, ending):
    original, path = photograph().convert(mode), tmp_path / f"x.{ending}"
    shown = original.convert("RGB")
    if mode.endswith("A"):
        original.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))))  # it is dropped
    original.save(path, quality=95)
    assert find_bad_images([{"file_name": str(path), "width": 64, "height": 48}], whole=True) == {}
    assert mean_error(read_image(str(path), "RGB"), shown) < 6


@pytest.mark.parametrize("name", ["JPEG", "JPEG2000", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "MPO", "TGA"])
def test_formats_of_photographs_are_read(tmp_path, name):
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {name}")
    photograph().save(tmp_path / "x.png", format=name)
    assert find_bad_images([{"file_name": str(tmp_path / "x.png"), "width": 64, "height": 48}], whole=True) == {}


@pytest.mark.parametrize("whole", [False, True])
def test_a_format_that_another_program_reads_is_refused_by_name(tmp_path, monkeypatch, whole):
    photograph().save(tmp_path / "x.jpg", format="EPS")
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(1))
    (reason,) = find_bad_images([{"file_name": str(tmp_path / "x.jpg")}], whole=whole).values()
    assert reason.startswith("is EPS, not one of ") and reason.endswith("WEBP: convert it") and not started


def test_colour_of_sixteen_bits_loads_and_grey_of_sixteen_bits_is_refused(tmp_path):
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    bad = find_bad_images([{"file_name": str(tmp_path / name)} for name in ("grey.png", "float.tiff")])
    assert len(bad) == 2 and all("more than 8 bits a channel" in reason for reason in bad.values())
    import cv2

    cv2.imwrite(str(tmp_path / "colour.png"), np.repeat(grey.astype(np.uint16)[:, :, None], 3, axis=2))
    assert find_bad_images([{"file_name": str(tmp_path / "colour.png")}], whole=True) == {}
    assert np.abs(read_image(str(tmp_path / "colour.png"), "RGB")[..., 0] - grey / 257).max() < 1.5


def truncate(path):
    """Write an image as a JPEG with a whole header and only half of its pixels."""
    Image.open(path).convert("RGB").save(path, format="JPEG", quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def batches_of(cfg, count, start=0):
    loader = build_train_loader(cfg)
    loader.start_iter = start
    stream = iter(loader)
    return [[(sample["file_name"], sample["image"]) for sample in next(stream)] for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_replaced_and_named(tmp_path, caplog, workers):
    cfg = dataset(tmp_path, count=6)
    sound = batches_of(cfg, 12)
    truncate(tmp_path / "mine1.png")
    assert find_bad_images(DatasetCatalog.get("mine")) == {}  # the header does not show that the file is truncated
    cfg.INPUT.MAX_BAD_FRACTION, cfg.DATALOADER.NUM_WORKERS = 0.2, workers
    batches = batches_of(cfg, 12)
    names = [os.path.basename(name) for batch in batches for name, _ in batch]
    assert "mine1.png" not in names and caplog.text.count("1 of 6 images cannot be used so far, now mine1.png") == 1
    for before, after in zip(sound, batches):
        for (name, image), (name_after, image_after) in zip(before, after):
            assert name.endswith("mine1.png") or (name == name_after and torch.equal(image, image_after))
    # Seed and position alone decide which image takes the place.
    for first, second in zip(batches[5:], batches_of(cfg, 7, start=5)):
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, second))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_mapper_is_not_taken_for_a_broken_image(tmp_path, monkeypatch, workers):
    cfg = dataset(tmp_path, count=6)
    cfg.INPUT.MAX_BAD_FRACTION, cfg.DATALOADER.NUM_WORKERS = 1.0, workers
    monkeypatch.setattr(DatasetMapper, "_transform_annotations", lambda *args: {}["no such key"])
    with pytest.raises(GDetKDError, match="mine.*is sound, but no training sample.*KeyError: 'no such key'"):
        batches_of(cfg, 1)


def test_an_image_that_changes_its_size_in_training_is_replaced(tmp_path, caplog):
    cfg = dataset(tmp_path, count=6)
    cfg.INPUT.MAX_BAD_FRACTION = 0.2
    loader = build_train_loader(cfg)
    Image.new("RGB", (64, 50)).save(tmp_path / "mine1.png")
    stream = iter(loader)
    names = {os.path.basename(sample["file_name"]) for _ in range(12) for sample in next(stream)}
    assert "mine1.png" not in names and "now mine1.png" in caplog.text


def test_too_many_truncated_images_stop_the_run(tmp_path, caplog):
    cfg = dataset(tmp_path, count=6)
    truncate(tmp_path / "mine1.png"), truncate(tmp_path / "mine4.png")
    cfg.INPUT.MAX_BAD_FRACTION, cfg.DATALOADER.NUM_WORKERS = 0.2, 1
    with pytest.raises(GDetKDError, match="2 of 6 images.*more than INPUT.MAX_BAD_FRACTION 0.2"):
        batches_of(cfg, 12)
    cfg.INPUT.MAX_BAD_FRACTION = 0.0
    with pytest.raises(GDetKDError, match="1 of 6 images"):
        batches_of(cfg, 12)


def test_bad_images_found_at_the_start_and_later_are_counted_together():
    count = BadImages(total=100, left_out=2, max_fraction=0.03, names="mine")
    count.note({"a.jpg": "broken"}), count.note({"a.jpg": "broken"}), count.note({})
    with pytest.raises(GDetKDError, match="4 of 100 images cannot be used so far, now b.jpg broken"):
        count.note({"b.jpg": "broken"})


def test_a_run_without_a_usable_image_stops(tmp_path):
    cfg = dataset(tmp_path, count=1)
    truncate(tmp_path / "mine0.png")
    cfg.INPUT.MAX_BAD_FRACTION = 1.0
    with pytest.raises(GDetKDError, match="100 images in turn cannot be used.*mine0.png"):
        batches_of(cfg, 1)


def test_a_truncated_image_of_a_test_set_is_named_before_training(tmp_path):
    cfg = dataset(tmp_path)
    truncate(tmp_path / "mine1.png")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny",), ("mine",)
    with pytest.raises(GDetKDError, match="mine: 1 of 4 images cannot be used for evaluation .mine1.png"):
        check_datasets(cfg)


def strange_images(kind):
    """Return the sizes (width, height) of the images of a strange dataset, and the boxes of the first image."""
    return {
        "one pixel": ([(1, 1), (64, 64)], [[0, 0, 1, 1]]),
        "10,000 pixels wide": ([(10_000, 20), (64, 64)], [[100.0, 2.0, 5000.0, 10.0]]),
        "5,000 boxes": ([(200, 200), (64, 64)], [[i % 100, i // 100, 8 + i % 70, 9 + i % 50] for i in range(5000)]),
        "one image": ([(64, 64)], [[5, 5, 20, 20]]),
    }[kind]


@pytest.mark.parametrize("kind", ["one pixel", "10,000 pixels wide", "5,000 boxes", "one image"])
def test_a_run_trains_on_strange_images(distill_cfg, tmp_path, kind):
    sizes, boxes = strange_images(kind)
    folder = tmp_path / "images"
    folder.mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    for image, size in zip(images, sizes):
        Image.fromarray(np.random.randint(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / image["file_name"])
    annotations = [{**BOX, "id": i, "bbox": box, "image_id": 0} for i, box in enumerate(boxes)]
    if len(sizes) > 1:
        annotations.append({**BOX, "id": len(boxes), "bbox": [5, 5, 20, 20], "image_id": 1})
    categories = [{"id": i + 1, "name": f"class{i}"} for i in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    entry = {"name": "mine", "kind": "coco", "json": str(tmp_path / "mine.json"), "images": str(folder)}
    keys = {
        "DATASETS.REGISTER": [entry],
        "DATASETS.TRAIN": ("mine",),
        "INPUT.MAX_SIZE_TRAIN": 256,
        "SOLVER.MAX_ITER": 2,
    }
    trainer = DistillTrainer(distill_cfg({**keys, "DATALOADER.ASPECT_RATIO_GROUPING": False}))
    batch = next(iter(trainer.data_loader))
    found = {os.path.basename(sample["file_name"]): len(sample["instances"]) for sample in batch}
    assert found == {"0.png": len(boxes), **({"1.png": 1} if len(sizes) > 1 else {})}
    before = [parameter.clone() for parameter in trainer.student.parameters()]
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.student.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.student.parameters()))


def test_a_set_without_an_object_fails_at_the_start(tmp_path):
    cfg = dataset(tmp_path, lambda content: content["annotations"].clear())
    with pytest.raises(GDetKDError, match="mine: no image has an object to learn from.*FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(cfg)
