"""Test the training loader: order, augmentations, resuming, workers and memory."""

import gc
import multiprocessing
import random
import subprocess
import weakref

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from conftest import make_cfg
from gdetkd.data import build_train_loader, headers
from gdetkd.data.batches import BatchStream
from gdetkd.data.samplers import SAMPLERS
from gdetkd.engine import DistillTrainer
from gdetkd.errors import GDetKDError
from gdetkd.random_state import random_state


def batches(count, start=0, **changes):
    loader = build_train_loader(make_cfg({"INPUT.MIN_SIZE_TRAIN": (40, 48, 56, 64), **changes}))
    loader.start_iter = start
    stream = iter(loader)
    return [[(sample["file_name"], sample["image"]) for sample in next(stream)] for _ in range(count)]


def same(first, second):
    return all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for one, two in zip(first, second) for a, b in zip(one, two)
    ) and len(first) == len(second)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_loader_starts_at_its_iteration_with_the_same_augmentations(grouping):
    keys = {"DATALOADER.ASPECT_RATIO_GROUPING": grouping}
    whole = batches(20, **keys)
    assert same(whole[7:], batches(13, start=7, **keys))
    assert not same(whole[6:19], whole[7:])


def test_workers_do_not_change_the_batches():
    assert same(batches(6), batches(6, **{"DATALOADER.NUM_WORKERS": 2}))


def test_another_seed_gives_other_batches():
    assert not same(batches(6), batches(6, SEED=4))


def test_epochs_draw_other_augmentations():
    drawn = [image.shape for batch in batches(18) for name, image in batch if name.endswith("tiny1.png")]
    assert len(drawn) >= 2 and len(set(drawn)) > 1


def test_the_loader_leaves_the_global_random_states_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches(3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_every_image_is_seen_once_an_epoch():
    names = [name for batch in batches(6, **{"DATALOADER.ASPECT_RATIO_GROUPING": False}) for name, _ in batch]
    assert len(set(names)) == 12


def test_grouped_batches_have_only_wide_or_only_high_images():
    stream = iter(BatchStream(lambda: iter(range(100)), 2, wide=[i % 3 == 0 for i in range(100)]))
    for _ in range(20):
        (a, _), (b, _) = next(stream)
        assert (a % 3 == 0) == (b % 3 == 0)


def test_random_state_is_restored_after_an_exception():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), random_state((1, 2)):
        torch.rand(3), random.random()
        raise ZeroDivisionError
    assert torch.equal(before, torch.get_rng_state())


class FakeGPU:
    """Put a generator in the place of the current GPU's generator, and record whether all GPUs are seeded."""

    def __init__(self, monkeypatch):
        self.generator = torch.Generator().manual_seed(7)
        self.reseeded_all = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.generator.get_state())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: self.generator.set_state(state))
        monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: self.generator.manual_seed(seed))
        monkeypatch.setattr(torch.cuda, "manual_seed_all", self._reseed_all)

    def _reseed_all(self, seed):
        self.reseeded_all = True

    def draw(self):
        return torch.rand(3, generator=self.generator).tolist()


def test_random_state_leaves_a_gpu_as_it_was(monkeypatch):
    undisturbed = FakeGPU(monkeypatch).draw()
    gpu = FakeGPU(monkeypatch)
    drawn = []
    for _ in range(2):
        with random_state((1, 2)):
            drawn.append(gpu.draw())
    assert drawn[0] == drawn[1] != undisturbed
    assert gpu.draw() == undisturbed
    assert not gpu.reseeded_all


@pytest.mark.parametrize("threads", [1, 3])
def test_workers_survive_a_sigterm_to_all_processes_and_end_with_the_training(threads):
    """A cluster's SIGTERM must not end a worker before the step is done and saved. The loader's own SIGTERM must.

    A worker forks with all of torch's threads.
    """
    torch.set_num_threads(threads)
    torch.rand(300, 300) @ torch.rand(300, 300)
    loader = build_train_loader(make_cfg({"DATALOADER.NUM_WORKERS": 1}))
    stream, before = iter(loader), set(multiprocessing.active_children())
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive() and all(next(stream) for _ in range(5))
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_processes_that_read_different_images_are_refused(monkeypatch):
    other = {"images": 11, "sha256": "another"}
    monkeypatch.setattr("gdetkd.data.train_loader.comm.all_gather", lambda mine: [mine, other])
    with pytest.raises(GDetKDError, match="12 for process 0, 11 for process 1"):
        build_train_loader(make_cfg({}))


class Tracked(dict):
    """Allow weak references to a dict."""


@pytest.fixture
def alive():
    """Register the dataset "tracked". Return a function that counts its images and annotations in memory."""
    DatasetCatalog.get("tiny")  # sets the class names in the metadata
    references = []

    def load():
        dicts = []
        for image in DatasetCatalog.get("tiny"):
            image["annotations"] = [Tracked(annotation) for annotation in image["annotations"]]
            dicts.append(Tracked(image))
        references.extend(weakref.ref(item) for image in dicts for item in (image, *image["annotations"]))
        return dicts

    def count():
        gc.collect()
        assert references
        return sum(reference() is not None for reference in references)

    DatasetCatalog.register("tracked", load)
    MetadataCatalog.get("tracked").set(thing_classes=list(MetadataCatalog.get("tiny").thing_classes))
    return count


@pytest.mark.parametrize(
    "change, sampler",
    [*(("none", name) for name in SAMPLERS), ("no sizes", "TrainingSampler"), ("bad images", "TrainingSampler")],
)
def test_a_loader_holds_only_serialised_images(alive, sampler, change, monkeypatch):
    if change == "no sizes":  # then the loader copies the dicts to add sizes
        monkeypatch.setattr(headers, "has_size", lambda sample: False)
    elif change == "bad images":
        read = headers._read_header
        bad = headers.Header("broken")
        monkeypatch.setattr(
            headers, "_read_header", lambda image, whole: bad if "tiny3" in image["file_name"] else read(image, whole)
        )
    keys = {"DATASETS.TRAIN": ("tracked",), "DATALOADER.SAMPLER_TRAIN": sampler, "INPUT.MAX_BAD_FRACTION": 0.5}
    loader = build_train_loader(make_cfg(keys))
    assert alive() == 0
    stream = iter(loader)
    next(stream)
    assert alive() == 0 and loader.description["images"] == (11 if change == "bad images" else 12)


def test_a_training_keeps_no_dict_of_its_datasets_in_memory(alive, distill_cfg):
    """This includes the checks before a training, and the second loader that Detectron2 builds for TEST.PRECISE_BN."""
    keys = {"DATASETS.TRAIN": ("tracked",), "DATASETS.TEST": ("tracked",), "TEST.EVAL_PERIOD": 2}
    keys.update({"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 1})
    watched = DistillTrainer(distill_cfg({**keys, "DISTILL.INSIGHT.PERIOD": 2}))
    assert alive() == 0 and watched.start_iter == 0
    trainer = DistillTrainer(distill_cfg(keys))
    trainer.train()
    assert alive() == 0
