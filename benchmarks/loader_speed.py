"""Measure how many images a second the training loader gives, to compare with what a step takes."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

from gdetkd.config_file import load_config
from gdetkd.data import build_train_loader, register_datasets

import numpy as np  # isort: skip
from budget import Budget, OutOfTime
from detectron2.config import CfgNode
from memory import HEIGHT, NAME, WIDTH, make_config, write_dataset
from PIL import Image

BLOBS = (24, 32)  # rows and columns of the coarse pattern that the photograph is made of


def measure_loader(
    config_file: str, opts: List[Any], workers: Sequence[int], images: int, seconds: float, budget: Budget
) -> List[Dict[str, Any]]:
    """Measure the loader of a recipe on made-up photographs, for several numbers of workers.

    All photographs are one file, so the disk is not measured. Reading, resizing, flipping and batching are.

    Args:
        config_file: the recipe, whose INPUT keys are used.
        opts: KEY VALUE changes to the config.
        workers: values of DATALOADER.NUM_WORKERS.
        images: images of a batch.
        seconds: longest time for each number of workers, after the workers have started.

    Raises:
        OutOfTime: there is no time for all numbers of workers.
    """
    cfg = load_config(config_file, opts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder, images=64 * images, boxes=448 * images, polygons=False)
        write_photograph(folder / "image.jpg")
        recipe = make_config(folder)
        register_datasets(recipe)
        cfg.DATASETS.TRAIN, cfg.DATASETS.REGISTER = (NAME,), recipe.DATASETS.REGISTER
        cfg.SOLVER.IMS_PER_BATCH = images
        results = []
        for index, count in enumerate(workers):
            share = budget.left_for_item() / (len(workers) - index)
            results.append({"workers": count, "images_a_second": _speed(cfg, count, min(seconds, share))})
            if budget.left() <= 0:
                raise OutOfTime
    return results


def workers_to_try() -> List[int]:
    """Return numbers of workers that this machine can run at once: none, Detectron2's default, and one a core."""
    cores = len(os.sched_getaffinity(0))
    return sorted({0, min(4, cores), cores})


def write_photograph(path: Path) -> None:
    """Write a JPEG that takes about as long to read as a photograph: coarse blobs with fine noise."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (*BLOBS, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    pixels = np.asarray(blobs) + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _speed(cfg: CfgNode, workers: int, seconds: float) -> float:
    """Return the images a second over some seconds. The time in which the workers start is not counted."""
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = workers
    batches = iter(build_train_loader(cfg))
    for _ in range(1 + 2 * workers):  # what the workers prepare ahead
        next(batches)
    start, loaded = time.perf_counter(), 0
    while loaded == 0 or time.perf_counter() - start < seconds:
        loaded += len(next(batches))
    return loaded / (time.perf_counter() - start)
