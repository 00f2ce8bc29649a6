"""Build Detectron2's training samplers from a seed, so that a resumed run continues the same order of images.

The weighted samplers of Detectron2 main work on v0.6, too. No sampler keeps the dicts of the images.
"""

import math
from typing import Any, Callable, Dict, List

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler

from ..errors import GDetKDError

Sample = Dict[str, Any]
# Builds a sampler from a seed. All processes use the same seed.
SeededSampler = Callable[[int], Any]
# Samplers that read the dataset of an image.
WEIGHTED = ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler")


def check_sampler(cfg: CfgNode) -> None:
    """Check the config keys of the sampler.

    Raises:
        GDetKDError: DATALOADER.SAMPLER_TRAIN names an unknown sampler, or a value for it is invalid.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in SAMPLERS:
        raise GDetKDError(f"DATALOADER.SAMPLER_TRAIN is {name!r}. Set it to one of: {', '.join(SAMPLERS)}.")
    if name in WEIGHTED:
        dataset_factors(cfg)


def build_sampler(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    """Return a function that builds the sampler of DATALOADER.SAMPLER_TRAIN from a seed.

    Args:
        dicts: the images to train on, in Detectron2's format.
        datasets: (len(dicts),) indices in DATASETS.TRAIN of the images' datasets. Only samplers in `WEIGHTED` read
            them.

    Raises:
        GDetKDError: `check_sampler` finds an error, or there are too few images for DATALOADER.RANDOM_SUBSET_RATIO.
    """
    check_sampler(cfg)
    return SAMPLERS[cfg.DATALOADER.SAMPLER_TRAIN](cfg, dicts, datasets)


def dataset_factors(cfg: CfgNode) -> Dict[str, float]:
    """Return the repeat factor of every dataset in DATASETS.TRAIN: DATASETS.TRAIN_REPEAT_FACTOR, or else 1.

    Raises:
        GDetKDError: an entry is not a pair of a dataset in DATASETS.TRAIN and a positive number.
    """
    factors = dict.fromkeys(cfg.DATASETS.TRAIN, 1.0)
    for pair in cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        if len(pair) != 2 or pair[0] not in factors or not _is_positive(pair[1]):
            raise GDetKDError(
                f"DATASETS.TRAIN_REPEAT_FACTOR: {pair!r} is not a pair of a dataset in DATASETS.TRAIN "
                f"({', '.join(cfg.DATASETS.TRAIN)}) and a positive number. To leave a dataset out, take it out of "
                "DATASETS.TRAIN."
            )
        factors[pair[0]] = float(pair[1])
    return factors


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _every_image(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    size = len(dicts)
    return lambda seed: TrainingSampler(size, seed=seed)


def _random_subset(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    size, ratio = len(dicts), cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if not 0 < ratio <= 1 or int(size * ratio) < 1:
        raise GDetKDError(
            f"DATALOADER.RANDOM_SUBSET_RATIO {ratio} of {size} images leaves none to train on, or is above 1. Set it "
            "to a share between 0 and 1 that leaves at least one image."
        )
    return lambda seed: RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)


def _rare_categories(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    return _repeating(_category_factors(cfg, dicts))


def _weighted(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    return _repeating(_factors_of_images(cfg, datasets))


def _weighted_categories(cfg: CfgNode, dicts: List[Sample], datasets: np.ndarray) -> SeededSampler:
    """Multiply the factors of datasets by the factors of categories, which are computed within a dataset."""
    factors = _factors_of_images(cfg, datasets)
    for index in range(len(cfg.DATASETS.TRAIN)):
        members = np.flatnonzero(datasets == index)
        factors[members] *= _category_factors(cfg, [dicts[member] for member in members])
    return _repeating(factors / factors.min())


def _factors_of_images(cfg: CfgNode, datasets: np.ndarray) -> torch.Tensor:
    by_name = dataset_factors(cfg)
    return torch.tensor([by_name[name] for name in cfg.DATASETS.TRAIN])[torch.as_tensor(datasets)]


def _category_factors(cfg: CfgNode, dicts: List[Sample]) -> torch.Tensor:
    """Return (len(dicts),) repeat factors. An image with a rarer category has a larger factor."""
    threshold = cfg.DATALOADER.REPEAT_THRESHOLD
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, threshold)
    # v0.6 always takes the square root. The root keeps the order of numbers and leaves 1 as it is. So squaring the
    # result gives the factor without the root.
    return factors if cfg.DATALOADER.REPEAT_SQRT else factors.square()


def _repeating(factors: torch.Tensor) -> SeededSampler:
    return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)


# Maps the values of DATALOADER.SAMPLER_TRAIN to samplers.
SAMPLERS: Dict[str, Callable[[CfgNode, List[Sample], np.ndarray], SeededSampler]] = {
    "TrainingSampler": _every_image,
    "RepeatFactorTrainingSampler": _rare_categories,
    "RandomSubsetTrainingSampler": _random_subset,
    "WeightedTrainingSampler": _weighted,
    "WeightedCategoryTrainingSampler": _weighted_categories,
}
