"""DISTILL.TEACHER.CACHE_MB: the teacher's backbone runs once for each view of an image, and nothing else changes."""

import json
import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from test_trainer import train

from conftest import make_batch, make_cfg
from gdetkd import DistillTrainer
from gdetkd.data.teacher_view import CACHE_KEY, TEACHER_IMAGE, key_of
from gdetkd.engine.cache_advice import cache_advice, views_of_an_image
from gdetkd.engine.check import Check
from gdetkd.engine.step_costs import measure_steps
from gdetkd.structures import Regions
from gdetkd.teacher import FrozenTeacher
from gdetkd.teacher.feature_cache import FeatureCache

CACHE = {"DISTILL.TEACHER.CACHE_MB": 100}


def counted(teacher):
    """Return a list that gets the number of images of each pass through the teacher's backbone."""
    seen, extract = [], teacher.adapter.extract
    teacher.adapter.extract = lambda images: (seen.append(len(images)), extract(images))[1]
    return seen


def look(teacher, batch, for_regions_alone=False):
    return teacher.extract(teacher.with_cache_keys(batch), for_regions_alone)


def test_an_image_runs_once_and_has_the_same_features(distill_cfg):
    teacher = FrozenTeacher(distill_cfg(CACHE))
    batch, seen = make_batch(), counted(teacher)
    first, again, turned = look(teacher, batch), look(teacher, batch), look(teacher, batch[::-1])
    assert seen == [1, 1]
    for name, features in first.items():
        assert torch.equal(features, again[name]) and torch.equal(features.flip(0), turned[name])
    for name, features in FrozenTeacher(distill_cfg()).extract(batch).items():
        torch.testing.assert_close(features, first[name], rtol=0, atol=float(1e-4 * features.abs().max()))


def test_other_pixels_another_size_and_other_padding_are_other_views(distill_cfg):
    teacher = FrozenTeacher(distill_cfg(CACHE))
    [one, two], seen = make_batch(sizes=((96, 96), (64, 48))), counted(teacher)
    look(teacher, [two])
    look(teacher, [{**two, "image": two["image"].flip(2)}])
    look(teacher, [{**two, "image": two["image"].reshape(3, 48, 64)}])
    look(teacher, [one, two])  # padded to the larger image
    assert len(seen) == 5 and teacher.cache.hits == 0
    look(teacher, [two])
    assert len(seen) == 5 and teacher.cache.hits == 1


def test_whole_maps_are_those_of_the_batch(distill_cfg):
    """A loss on whole maps, such as PKD, compares cells in the padding, too."""
    batch = make_batch(sizes=((96, 96), (64, 48)))
    expected = FrozenTeacher(distill_cfg()).extract(batch)
    for name, features in look(FrozenTeacher(distill_cfg(CACHE)), batch).items():
        torch.testing.assert_close(features, expected[name], rtol=0, atol=float(1e-4 * features.abs().max()))


@pytest.mark.parametrize("losses, alone", [(("SGFI", "CKD", "CLS", "REG", "ROIFI"), True), (("SGFI", "PKD"), False)])
def test_images_are_padded_alone_if_no_loss_reads_whole_maps(distill_cfg, losses, alone):
    model = build_model(distill_cfg({**CACHE, "DISTILL.LOSSES": losses})).train()
    batches = make_batch(sizes=((64, 64), (64, 32))), make_batch(sizes=((64, 96), (64, 32)), seed=1)
    batches[1][1] = batches[0][1]  # the same image in a wider batch
    seen = counted(model.teacher)
    for batch in batches:
        with EventStorage():
            model(batch)
    assert len(seen) == (3 if alone else 4)


def test_a_dense_teachers_images_have_the_padding_of_the_batch(pair_cfg):
    """Its head runs convolutions on whole maps, so a region's embedding depends on what is beyond the border."""
    losses = {"DISTILL.LOSSES": ("SGFI", "CKD")}
    assert not build_model(pair_cfg("retinanet-faster_rcnn", losses)).reads_regions_alone
    assert build_model(pair_cfg("faster_rcnn-retinanet", losses)).reads_regions_alone


@pytest.mark.parametrize("keys", [{}, {"DISTILL.TEACHER.DTYPE": "bfloat16"}])
def test_an_image_has_one_view_however_large_its_batch_is(distill_cfg, keys):
    teacher = FrozenTeacher(distill_cfg({**CACHE, **keys}))
    sizes, seen = ((64, 48), (96, 32), (32, 128)), counted(teacher)
    batch = make_batch(sizes=sizes)
    alone = [teacher.extract([inputs]) for inputs in batch]  # without keys: padded for itself
    for order in ([0, 1, 2], [2, 0], [1]):
        found = look(teacher, [batch[place] for place in order], for_regions_alone=True)
        together = teacher.preprocess([batch[place] for place in order]).tensor
        for (name, features), stride in zip(found.items(), teacher.spec.strides.values()):
            assert features.shape[-2:] == tuple(-(-side // stride) for side in together.shape[-2:])
            for features_of_one, place in zip(features, order):
                [expected] = alone[place][name]
                height, width = expected.shape[1:]
                assert torch.equal(features_of_one[:, :height, :width], expected)
                right, below = features_of_one[:, :height, width - 1 :], features_of_one[:, height - 1 :]
                assert torch.equal(right, right[:, :, :1].expand_as(right))  # the border is repeated
                assert torch.equal(below, below[:, :1].expand_as(below))
    assert len(seen) == 3 + 3


def test_a_region_at_the_border_has_the_same_features_in_every_batch(distill_cfg):
    teacher, batch = FrozenTeacher(distill_cfg(CACHE)), make_batch(sizes=((64, 48), (96, 128)))
    regions = [Boxes(torch.tensor([[20.0, 30.0, 48.0, 64.0]])), Boxes(torch.zeros(0, 4))]
    pooled = []
    for count in (1, 2):
        features = look(teacher, batch[:count], for_regions_alone=True)
        pooled.append(teacher.look_at(features, Regions(regions[:count]), {"pooled"}).pooled)
    torch.testing.assert_close(*pooled)


def test_a_change_of_what_was_returned_does_not_reach_the_cache(distill_cfg):
    teacher = FrozenTeacher(distill_cfg(CACHE))
    batch = make_batch()[:1]
    first = {name: features.clone() for name, features in look(teacher, batch).items()}
    for features in look(teacher, batch).values():
        features.zero_()
    assert all(torch.equal(features, first[name]) for name, features in look(teacher, batch).items())


def test_the_limit_is_kept_and_said_once(caplog):
    caplog.set_level("INFO")
    cache = FeatureCache(0.001)  # 1,000 bytes
    images = torch.rand(4, 3, 8, 8)
    for _ in range(2):
        keys = [bytes([place]) for place in range(4)]
        found = cache.features(images.split(1), keys, lambda image: {"p2": image[:, :2]})  # 512 bytes
        assert torch.equal(found["p2"], images[:, :2])
    assert (cache.hits, cache.misses) == (1, 7)
    assert caplog.text.count("fill DISTILL.TEACHER.CACHE_MB") == 1
    assert cache.take_share() == 1 / 8 and cache.take_share() == 0


def test_keys_depend_on_pixels_and_size():
    image = torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4)
    others = [image.flip(2), image.reshape(3, 4, 2), image + 1, image.transpose(1, 2)]
    assert len({key_of(image), *map(key_of, others)}) == 5
    assert key_of(image) == key_of(image.flip(2).flip(2)) == key_of(image.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("keys", [{}, {"DISTILL.TEACHER.SCALE": 2.0}, {"DISTILL.LOSSES": ()}])
def test_the_loader_adds_the_keys_before_images_go_to_a_device(distill_cfg, monkeypatch, keys):
    cfg = distill_cfg({**CACHE, **keys})
    trainer = DistillTrainer(cfg)
    batch = next(iter(trainer.data_loader))
    assert all((CACHE_KEY in sample) == bool(cfg.DISTILL.LOSSES) for sample in batch)
    if cfg.DISTILL.LOSSES:
        assert all(sample[CACHE_KEY] == key_of(sample.get(TEACHER_IMAGE, sample["image"])) for sample in batch)
        monkeypatch.setattr("gdetkd.teacher.frozen.key_of", None)
        again = trainer.distiller.teacher.with_cache_keys(batch)
        assert [sample[CACHE_KEY] for sample in again] == [sample[CACHE_KEY] for sample in batch]


@pytest.mark.parametrize("keys", [{}, {"DISTILL.TEACHER.SCALE": 2.0}])
def test_a_resumed_run_is_bit_identical_although_its_cache_is_empty(distill_cfg, tmp_path, keys):
    cfg = distill_cfg({**CACHE, **keys, "SOLVER.MAX_ITER": 20, "SOLVER.CHECKPOINT_PERIOD": 5, "SOLVER.BASE_LR": 1e-5})
    whole, losses = train(DistillTrainer, cfg)
    line = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[-1])
    assert line["teacher/kept"] > 0.2  # 12 images in 2 views, seen 40 times
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000004.pth")
    (tmp_path / "run" / "model_final.pth").unlink()
    resumed, again = train(DistillTrainer, cfg, resume=True)
    assert again == {step: values for step, values in losses.items() if step >= 5}


def test_without_the_key_a_batch_has_no_digests_and_runs_at_once(distill_cfg):
    teacher = FrozenTeacher(distill_cfg())
    batch, seen = make_batch(), counted(teacher)
    assert teacher.with_cache_keys(batch) is batch
    look(teacher, batch), look(teacher, batch)
    assert seen == [2, 2]


@pytest.mark.parametrize(
    "keys, views",
    [
        ({}, 2),
        ({"INPUT.RANDOM_FLIP": "none"}, 1),
        ({"INPUT.MIN_SIZE_TRAIN": (48, 64)}, 4),
        ({"INPUT.MIN_SIZE_TRAIN": (48, 64), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, 0),
        ({"INPUT.CROP.ENABLED": True}, 0),
        ({"INPUT.INSTABOOST.ENABLED": True}, 0),
    ],
)
def test_the_number_of_views(keys, views):
    assert views_of_an_image(make_cfg(keys)) == views


def test_the_advised_cache_holds_all_views_and_is_not_advised_twice(distill_cfg):
    cfg = distill_cfg()
    model, batches = build_model(cfg), [make_batch(), make_batch(sizes=((64, 64), (64, 96)))]
    advice = cache_advice(cfg, model, batches, images=500)
    [megabytes] = re.findall(r"CACHE_MB (\d+) would keep", advice)
    cells = sum(features[0].numel() for features in model.teacher.extract(make_batch(sizes=((64, 64),))).values())
    view = 4 * cells * 4.5 / 4  # images of 64, 64, 64 and 96 pixels in width: the teacher pads 48 to 64
    assert 1000 * view <= 1e6 * int(megabytes) < 1000 * view + 1e6
    cfg.DISTILL.TEACHER.CACHE_MB = int(megabytes)
    assert cache_advice(cfg, model, batches, images=500) == ""
    assert cache_advice(cfg, model, batches, images=10**9) == ""


def test_nothing_is_advised_where_padding_makes_more_views(distill_cfg):
    cfg = distill_cfg({"DISTILL.LOSSES": ("SGFI", "PKD")})
    batches = [make_batch(), make_batch(sizes=((64, 64), (64, 96)))]
    assert cache_advice(cfg, build_model(cfg), batches, images=5) == ""
    assert "would keep" in cache_advice(cfg, build_model(cfg), batches[:1] * 2, images=5)


def test_the_check_times_steps_that_run_the_teachers_backbone(distill_cfg, monkeypatch):
    """Its batches come again, so the cache would hold all of them, unlike in a training."""
    check = Check(distill_cfg({"DISTILL.TEACHER.CACHE_MB": 10, "DISTILL.TEACHER.MIN_AP": 0.0}), images=2)
    teacher, caches = check._trainer.distiller.teacher, []

    def measure(*args):
        caches.append(teacher.cache)
        return measure_steps(*args)

    monkeypatch.setattr("gdetkd.engine.check.measure_steps", measure)
    assert "These steps run the teacher's backbone" in check.run()
    assert caches == [None]
