"""Test every training sampler of Detectron2 v0.6 and main: rates of images, exact resuming, and several processes."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import build as detectron2_build
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

from conftest import make_cfg, write_coco
from gdetkd.data import build_train_loader, register_datasets
from gdetkd.data.samplers import SAMPLERS, build_sampler
from gdetkd.data.train_images import load_images
from gdetkd.errors import GDetKDError

# Keys with which the draws of each sampler differ from those of its defaults.
KEYS = {
    "TrainingSampler": {},
    "RepeatFactorTrainingSampler": {"DATALOADER.REPEAT_THRESHOLD": 1.0, "DATALOADER.REPEAT_SQRT": False},
    "RandomSubsetTrainingSampler": {"DATALOADER.RANDOM_SUBSET_RATIO": 0.5},
    "WeightedTrainingSampler": {"DATASETS.TRAIN_REPEAT_FACTOR": [["few", 2.5]]},
    "WeightedCategoryTrainingSampler": {
        "DATASETS.TRAIN_REPEAT_FACTOR": [["few", 2.0], ["many", 0.5]],
        "DATALOADER.REPEAT_THRESHOLD": 1.0,
    },
}


@pytest.fixture
def cfg_of(tmp_path):
    """Return a function that makes the config of a sampler on two datasets: "many" has 16 images, "few" has 4."""
    entries = []
    for seed, (name, count) in enumerate({"many": 16, "few": 4}.items()):
        write_coco(tmp_path, count, name=name, seed=seed)
        entries.append({"name": name, "kind": "coco", "json": f"{tmp_path}/{name}.json", "images": str(tmp_path)})

    def make(sampler, **changes):
        keys = {"DATASETS.REGISTER": entries, "DATASETS.TRAIN": ("many", "few"), "DATALOADER.SAMPLER_TRAIN": sampler}
        cfg = make_cfg({**keys, **KEYS.get(sampler, {}), **changes})
        register_datasets(cfg)
        return cfg

    return make


def draws(cfg, count, seed=5):
    dicts, datasets = load_images(cfg)
    sampler = iter(build_sampler(cfg, dicts, datasets)(seed))
    return np.array([next(sampler) for _ in range(count)])


def rates(cfg, count=20_000):
    """Return how often each image is drawn, relative to the mean of all images."""
    drawn = np.bincount(draws(cfg, count), minlength=20)
    return drawn / drawn.mean()


def expected_rates(factors):
    factors = np.asarray(factors)
    return factors / factors.mean()


def category_factors(dicts, threshold, sqrt):
    """Compute the repeat factor of each image by LVIS (Gupta et al., 2019), appendix B.2, in plain loops."""
    factors = []
    for image in dicts:
        candidates = [1.0]
        for category in {annotation["category_id"] for annotation in image["annotations"]}:
            images = sum(any(a["category_id"] == category for a in other["annotations"]) for other in dicts)
            ratio = threshold / (images / len(dicts))
            candidates.append(ratio**0.5 if sqrt else ratio)
        factors.append(max(candidates))
    return np.array(factors)


def names_of(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resume_is_exact(cfg_of, sampler):
    cfg = cfg_of(sampler)
    assert set(KEYS) == set(SAMPLERS)
    whole, resumed = build_train_loader(cfg), build_train_loader(cfg)
    resumed.start_iter = 15
    batches = iter(whole)
    before, after = ([next(batches) for _ in range(15)] for _ in range(2))
    again = iter(resumed)
    for batch in after:
        for expected, found in zip(batch, next(again)):
            assert expected["file_name"] == found["file_name"] and torch.equal(expected["image"], found["image"])
    assert names_of(before) != names_of(after)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loader_draws_what_the_sampler_draws(cfg_of, sampler):
    cfg = cfg_of(sampler, **{"DATALOADER.ASPECT_RATIO_GROUPING": False})
    names = [sample["file_name"] for sample in load_images(cfg)[0]]
    batches = iter(build_train_loader(cfg))
    loaded = sum(names_of(next(batches) for _ in range(20)), [])
    assert loaded == [names[index] for index in draws(cfg, 40, seed=cfg.SEED)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_processes_share_one_stream_of_indices(cfg_of, sampler, monkeypatch):
    """All processes have the same subset, factors and order. Each process takes every second index."""
    cfg = cfg_of(sampler)
    alone = draws(cfg, 60)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        assert (draws(cfg, 30) == alone[rank::2]).all()


def test_training_sampler_sees_every_image_once_an_epoch(cfg_of):
    assert sorted(draws(cfg_of("TrainingSampler"), 20)) == list(range(20))


@pytest.mark.parametrize("sqrt", [True, False])
def test_rare_categories_are_repeated(cfg_of, sqrt):
    cfg = cfg_of("RepeatFactorTrainingSampler", **{"DATALOADER.REPEAT_SQRT": sqrt})
    factors = category_factors(load_images(cfg)[0], 1.0, sqrt)
    assert factors.max() > 1.2
    assert np.allclose(rates(cfg), expected_rates(factors), atol=0.06)


def test_factors_without_a_root_equal_those_of_detectron2_main(cfg_of):
    code = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency.__code__
    if "sqrt" not in code.co_varnames[: code.co_argcount]:
        pytest.skip("Detectron2 v0.6 always takes the root")
    cfg = cfg_of("RepeatFactorTrainingSampler", **{"DATALOADER.REPEAT_SQRT": False})
    dicts, datasets = load_images(cfg)
    sampler = build_sampler(cfg, dicts, datasets)(5)
    reference = RepeatFactorTrainingSampler(
        RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 1.0, sqrt=False), seed=5
    )
    assert torch.allclose(sampler._int_part + sampler._frac_part, reference._int_part + reference._frac_part)


def test_a_random_subset_stays_the_same(cfg_of):
    cfg = cfg_of("RandomSubsetTrainingSampler")
    drawn = draws(cfg, 100)
    assert all(set(drawn[start : start + 10]) == set(drawn) for start in range(0, 100, 10))
    assert len(set(drawn)) == 10 and set(draws(cfg, 100, seed=6)) != set(drawn)


def test_datasets_are_repeated_by_their_factors(cfg_of):
    cfg = cfg_of("WeightedTrainingSampler")
    assert np.allclose(rates(cfg), expected_rates([1.0] * 16 + [2.5] * 4), atol=0.06)


def test_datasets_and_their_categories_are_repeated(cfg_of):
    cfg = cfg_of("WeightedCategoryTrainingSampler")
    dicts, datasets = load_images(cfg)
    assert datasets.tolist() == [0] * 16 + [1] * 4
    factors = np.concatenate(
        [0.5 * category_factors(dicts[:16], 1.0, True), 2.0 * category_factors(dicts[16:], 1.0, True)]
    )
    assert np.allclose(rates(cfg), expected_rates(factors), atol=0.06)


@pytest.mark.parametrize("sampler", ["WeightedTrainingSampler", "WeightedCategoryTrainingSampler"])
def test_weighted_samplers_have_the_factors_of_detectron2_main(cfg_of, sampler):
    if not hasattr(detectron2_build, "_build_weighted_sampler"):
        pytest.skip("Detectron2 v0.6 has no weighted sampler")
    cfg = cfg_of(sampler)
    reference = detectron2_build._build_weighted_sampler(cfg, sampler == "WeightedCategoryTrainingSampler")
    built = build_sampler(cfg, *load_images(cfg))(5)
    assert torch.allclose(built._int_part + built._frac_part, reference._int_part + reference._frac_part)


def test_factors_stay_with_their_images_if_bad_images_are_left_out(cfg_of, tmp_path):
    for index in range(8):
        (tmp_path / f"many{index}.png").unlink()
    cfg = cfg_of("WeightedTrainingSampler", **{"INPUT.MAX_BAD_FRACTION": 0.5})
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    batches = iter(build_train_loader(cfg))
    drawn = sum(names_of(next(batches) for _ in range(180)), [])
    few = sum("few" in name for name in drawn)
    assert few / len(drawn) == pytest.approx(4 * 2.5 / (8 + 4 * 2.5), abs=0.03)


def test_crowded_images_are_left_out_of_their_dataset(cfg_of, tmp_path):
    content = json.loads((tmp_path / "many.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] <= 6)
    (tmp_path / "many.json").write_text(json.dumps(content))
    dicts, datasets = load_images(cfg_of("WeightedTrainingSampler"))
    assert datasets.tolist() == [0] * 10 + [1] * 4
    assert ["few" in sample["file_name"] for sample in dicts] == [False] * 10 + [True] * 4


@pytest.mark.parametrize(
    "sampler, changes, match",
    [
        ("NoSampler", {}, "'NoSampler'.*TrainingSampler, .*WeightedCategoryTrainingSampler"),
        ("RandomSubsetTrainingSampler", {"DATALOADER.RANDOM_SUBSET_RATIO": 0.0}, "RANDOM_SUBSET_RATIO 0.0 of 20"),
        ("RandomSubsetTrainingSampler", {"DATALOADER.RANDOM_SUBSET_RATIO": 1.5}, "RANDOM_SUBSET_RATIO 1.5 of 20"),
        ("RandomSubsetTrainingSampler", {"DATALOADER.RANDOM_SUBSET_RATIO": 0.01}, "leaves none"),
        ("WeightedTrainingSampler", {"DATASETS.TRAIN_REPEAT_FACTOR": [["other", 2.0]]}, r"\['other', 2.0\] is not a"),
        ("WeightedTrainingSampler", {"DATASETS.TRAIN_REPEAT_FACTOR": [["few", 0.0]]}, "TRAIN_REPEAT_FACTOR"),
        ("WeightedTrainingSampler", {"DATASETS.TRAIN_REPEAT_FACTOR": [["few", float("nan")]]}, "positive"),
        ("WeightedTrainingSampler", {"DATASETS.TRAIN_REPEAT_FACTOR": [["few"]]}, r"\['few'\] is not a pair"),
    ],
)
def test_invalid_values_of_samplers_are_refused(cfg_of, sampler, changes, match):
    with pytest.raises(GDetKDError, match=match):
        build_train_loader(cfg_of(sampler, **changes))


def test_datasets_without_class_names_can_be_weighted(cfg_of):
    cfg = cfg_of("WeightedTrainingSampler")
    for name in ("one", "two"):
        DatasetCatalog.register(name, lambda: DatasetCatalog.get("few"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_REPEAT_FACTOR = ("one", "two"), [["two", 3]]
    assert load_images(cfg)[1].tolist() == [0] * 4 + [1] * 4
    assert set(draws(cfg, 16)) == set(range(8))
