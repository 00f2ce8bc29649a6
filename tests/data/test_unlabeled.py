"""Batches of images with and without labels: their order, their augmentations, and sets that are refused."""

import json
import os
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from conftest import make_cfg
from gdetkd.data import build_train_loader, headers, register_datasets, train_mapper
from gdetkd.data.batches import MixedStream
from gdetkd.data.unlabeled import UnlabeledMapper, doubtful_boxes, is_unlabeled, split_batch
from gdetkd.errors import GDetKDError
from gdetkd.safe_load import sha256_of_file

BAD, GOOD = headers.Header("broken"), headers.Header(None)


@pytest.fixture
def unlabeled_cfg(pseudo_entry):
    """Return a function that makes the config of a training on "tiny" and eight images without labels."""

    def make(changes={}, **entry):
        keys = {"DATASETS.REGISTER": [pseudo_entry(**entry)], "DATASETS.UNLABELED": ("pseudo",)}
        cfg = make_cfg({**keys, "SOLVER.IMS_PER_BATCH": 4, **changes})
        register_datasets(cfg)
        return cfg

    return make


def names_of(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


def batches_of(cfg, count, start=0):
    loader = build_train_loader(cfg)
    loader.start_iter = start
    return list(islice(iter(loader), count))


@pytest.mark.parametrize("fraction, unlabeled", [(0.01, 1), (0.25, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.99, 3)])
def test_a_fraction_of_each_batch_is_unlabeled(unlabeled_cfg, fraction, unlabeled):
    for batch in batches_of(unlabeled_cfg({"DISTILL.UNLABELED.FRACTION": fraction}), 6):
        assert [is_unlabeled(sample) for sample in batch] == [False] * (4 - unlabeled) + [True] * unlabeled
        assert [len(part) for part in split_batch(batch)] == [4 - unlabeled, unlabeled]


def test_the_order_depends_on_the_seed_alone_and_a_resumed_loader_continues_it(unlabeled_cfg):
    cfg = unlabeled_cfg({"DATALOADER.ASPECT_RATIO_GROUPING": False})
    whole = batches_of(cfg, 8)
    for again, start in ((batches_of(cfg, 8), 0), (batches_of(cfg, 3, start=5), 5)):
        assert names_of(again) == names_of(whole[start:])
        for batch, before in zip(again, whole[start:]):
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch, before))
    for part, images in ((slice(0, 2), 12), (slice(2, 4), 8)):
        first_epoch = [name for batch in names_of(whole) for name in batch[part]][: min(images, 16)]
        assert len(set(first_epoch)) == len(first_epoch)


def test_the_two_kinds_of_images_have_their_own_augmentations(unlabeled_cfg):
    """Otherwise the images at the same position would always be flipped and resized alike."""
    cfg = unlabeled_cfg({"INPUT.MIN_SIZE_TRAIN": tuple(range(40, 80)), "DATALOADER.ASPECT_RATIO_GROUPING": False})
    sides = [[min(sample["image"].shape[-2:]) for sample in batch] for batch in batches_of(cfg, 6)]
    assert all(batch[:2] != batch[2:] for batch in sides)


def test_batches_of_images_of_the_same_shape_are_joined():
    wide = [index % 2 == 0 for index in range(20)]
    labeled = [[(0, 0)], [(1, 1)], [(2, 2)], [(3, 3)], [(4, 4)], [(6, 5)]]
    unlabeled = [[(index, index)] for index in (0, 2, 1, 3, 4, 6, 8)]
    found = list(MixedStream(labeled, iter(unlabeled), 10, wide))
    assert [tuple(index for index, _ in batch) for batch in found] == [
        (0, 10),
        (1, 11),
        (2, 12),
        (3, 13),
        (4, 14),
        (6, 16),
    ]


def test_too_few_unlabeled_images_of_a_shape_do_not_stop_the_stream():
    labeled, unlabeled = ([[(0, step)] for step in range(40)], ([(1, step)] for step in range(1000)))
    found = list(MixedStream(labeled, unlabeled, 1, [True, False, False]))
    assert len(found) == 40 and [batch[1] for batch in found] == [(2, step) for step in range(40)]


def test_many_unlabeled_images_do_not_hide_missing_labeled_ones(unlabeled_cfg, monkeypatch):
    monkeypatch.setattr(headers, "_read_header", lambda image, whole: BAD if "tiny" in image["file_name"] else GOOD)
    with pytest.raises(GDetKDError, match="tiny: 12 of 12 images cannot be used"):
        build_train_loader(unlabeled_cfg({"INPUT.MAX_BAD_FRACTION": 0.7}))


def test_a_dataset_without_class_names_is_refused(unlabeled_cfg, monkeypatch):
    monkeypatch.setattr("gdetkd.data.unlabeled.class_names", lambda cfg: None)
    with pytest.raises(GDetKDError, match="'tiny' does not name its classes, so the boxes of pseudo cannot be matched"):
        build_train_loader(unlabeled_cfg())


def test_without_unlabeled_images_the_labeled_ones_are_the_same(unlabeled_cfg):
    """The labelled half of a mixed batch of four is a plain batch of two, with the same augmentations."""
    mixed = batches_of(unlabeled_cfg(), 6)
    plain = batches_of(make_cfg({}), 6)
    for batch, alone in zip(mixed, plain):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batch[:2], alone, strict=True))


def test_doubtful_boxes_take_part_in_the_augmentations(unlabeled_cfg):
    for batch in batches_of(unlabeled_cfg(), 6):
        for sample in batch[2:]:
            original = next(s for s in DatasetCatalog.get("pseudo") if s["file_name"] == sample["file_name"])
            expected = {0: [], 1: []}
            for item in original["annotations"]:
                box = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
                expected[item["iscrowd"]].append(box)
            height, width = sample["image"].shape[-2:]
            scale = height / original["height"]
            found = {0: sample["instances"].gt_boxes.tensor, 1: doubtful_boxes([sample], torch.device("cpu"))[0].tensor}
            is_flipped = None
            for kind in (0, 1):
                boxes = torch.as_tensor(np.array(expected[kind]).reshape(-1, 4) * scale, dtype=torch.float32)
                flipped = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
                same = torch.allclose(found[kind], boxes, atol=1e-3), torch.allclose(found[kind], flipped, atol=1e-3)
                assert any(same)
                if len(boxes) and is_flipped is not None:
                    assert same[is_flipped]
                if len(boxes) and same[0] != same[1]:
                    is_flipped = same[1]


def test_the_mapper_leaves_labeled_images_to_the_other_mapper():
    mapper = UnlabeledMapper(lambda sample: {"mapped": sample}, pytest.fail, 3)
    assert mapper({"file_name": "a"}) == {"mapped": {"file_name": "a"}}


def test_a_broken_image_is_replaced_by_an_image_of_its_kind(unlabeled_cfg, monkeypatch):
    cfg = unlabeled_cfg({"INPUT.MAX_BAD_FRACTION": 0.9})

    class Breaking(train_mapper.TrainMapper):
        def __call__(self, sample):
            if sample["file_name"].endswith(("pseudo1.png", "pseudo2.png", "tiny1.png", "tiny2.png", "tiny3.png")):
                raise OSError("broken")
            return super().__call__(sample)

    monkeypatch.setattr(train_mapper, "TrainMapper", Breaking)
    for batch in batches_of(cfg, 10):
        assert [is_unlabeled(sample) for sample in batch] == [False, False, True, True]


def test_images_that_are_also_labeled_are_left_out(unlabeled_cfg, tiny_dataset, tmp_path, caplog):
    cfg = unlabeled_cfg()
    for number in (1, 3):
        shutil.copy(tiny_dataset / f"tiny{number}.png", tmp_path / "pseudo" / f"pseudo{number}.png")
    names = {name for batch in names_of(batches_of(cfg, 20)) for name in batch[2:]}
    assert len(names) == 6 and not any(name.endswith(("pseudo1.png", "pseudo3.png")) for name in names)
    assert "2 images are also in DATASETS.TRAIN" in caplog.text


def test_images_of_the_test_set_are_refused(unlabeled_cfg, tiny_dataset, tmp_path):
    cfg = unlabeled_cfg({"DATASETS.TEST": ("tiny",)})
    shutil.copy(tiny_dataset / "tiny4.png", tmp_path / "pseudo" / "pseudo4.png")
    with pytest.raises(GDetKDError, match="1 images of pseudo are also in DATASETS.TEST, such as .*pseudo4.png"):
        build_train_loader(cfg)


def labelled_here(folder):
    """Return a change of the JSON: it notes size and SHA-256 of each image, as tools/label.py does."""

    def change(content):
        for image in content["images"]:
            path = folder / image["file_name"]
            image.update(bytes=path.stat().st_size, sha256=sha256_of_file(str(path)))

    return change


def test_images_that_have_changed_since_they_were_labelled_are_refused(unlabeled_cfg, tmp_path):
    cfg = unlabeled_cfg(change=labelled_here(tmp_path / "pseudo"))
    build_train_loader(cfg)
    with open(tmp_path / "pseudo" / "pseudo4.png", "ab") as file:
        file.write(b"0")
    with pytest.raises(GDetKDError, match="1 images of 'pseudo' have changed .* such as .*pseudo4.png.*label.py again"):
        build_train_loader(cfg)


def test_a_newer_image_of_the_same_size_may_be_one_of_the_test_set(unlabeled_cfg, tiny_dataset, tmp_path):
    """Two images have the same number of bytes, and one takes the place of the other."""
    cfg = unlabeled_cfg({"DATASETS.TEST": ("tiny",)}, change=labelled_here(tmp_path / "pseudo"))
    copy, json_file = tmp_path / "pseudo" / "pseudo4.png", tmp_path / "pseudo" / "pseudo.json"
    shutil.copy(tiny_dataset / "tiny4.png", copy)
    content = json.loads(json_file.read_text())
    [image] = [image for image in content["images"] if image["file_name"] == copy.name]
    image["bytes"] = copy.stat().st_size
    json_file.write_text(json.dumps(content))
    os.utime(json_file, (0, 0))
    with pytest.raises(GDetKDError, match="1 images of pseudo are also in DATASETS.TEST, such as .*pseudo4.png"):
        build_train_loader(cfg)


def with_other_classes(content):
    content["categories"][1]["name"] = "a bird"


@pytest.mark.parametrize(
    "changes, entry, match",
    [
        ({}, {"change": with_other_classes}, "made for the classes class0, a bird, class2, and the student has class0"),
        ({"DATASETS.UNLABELED": ("tiny",)}, {}, "UNLABELED names 'tiny'. The entries of kind `pseudo` .* are pseudo"),
        ({"SOLVER.IMS_PER_BATCH": 1}, {}, "Each process takes 1 image in a step, but .* needs an image with labels"),
    ],
)
def test_sets_that_do_not_fit_are_refused(unlabeled_cfg, changes, entry, match):
    with pytest.raises(GDetKDError, match=match):
        build_train_loader(unlabeled_cfg(changes, **entry))
