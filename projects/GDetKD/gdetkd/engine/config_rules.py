"""Check the numbers and names of a config before anything is built."""

import math
from typing import Any, Callable, List, NamedTuple, Sequence

from detectron2.config import CfgNode

from ..config import student_architecture
from ..detector_config import DENSE, PRECOMPUTED, needs_proposals, wrong_parts
from ..dotted_keys import get_key
from ..errors import GDetKDError
from ..teacher.torchvision_file import PREFIX as TORCHVISION
from .evaluators import wrong_implementation
from .trackers import TRACKERS, missing_packages


class Rule(NamedTuple):
    """Hold a key, a test of its value, and a description of valid values."""

    key: str
    holds: Callable[[Any], bool]
    wanted: str


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_finite(value) and value >= least


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _is_size(value: Any) -> bool:
    return all(map(_at_least(0), value if isinstance(value, (tuple, list)) else (value,)))


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _is_rising(values: Sequence[Any]) -> bool:
    return all(map(_is_positive, values)) and list(values) == sorted(set(values))


# Values that Detectron2's augmentations know.
FLIPS = ("horizontal", "vertical", "none")
CROPS = ("relative", "relative_range", "absolute", "absolute_range")
RULES = (
    Rule("SOLVER.IMS_PER_BATCH", _at_least(1), "1 or more images a step"),
    Rule("SOLVER.MAX_ITER", _at_least(1), "1 or more iterations"),
    Rule("SOLVER.CHECKPOINT_PERIOD", _at_least(1), "1 or more iterations between two checkpoints"),
    Rule("SOLVER.BASE_LR", _is_positive, "a positive learning rate"),
    Rule("SOLVER.GAMMA", _is_positive, "a positive factor"),
    Rule("SOLVER.STEPS", _is_rising, "positive iteration numbers in increasing order"),
    Rule("SOLVER.WARMUP_ITERS", _at_least(0), "0 or more iterations"),
    Rule("SOLVER.WARMUP_METHOD", _one_of("constant", "linear"), '"constant" or "linear"'),
    Rule("SOLVER.WEIGHT_DECAY", _at_least(0), "0 or more"),
    Rule("TEST.EVAL_PERIOD", _at_least(-1), "the iterations between two evaluations, or 0 to evaluate only at the end"),
    Rule("TEST.PATIENCE", _at_least(0), "the number of evaluations without a rise of the AP, or 0 for no limit"),
    Rule("TEST.DETECTIONS_PER_IMAGE", lambda value: _at_least(1)(value) or value == -1, "1 or more, or -1 for all"),
    Rule("LOG.WRITERS", lambda names: set(names) <= set(TRACKERS), f"some of {tuple(TRACKERS)}, or ()"),
    Rule("LOG.PROJECT", bool, "the name of a project"),
    Rule("DATALOADER.NUM_WORKERS", _at_least(0), "0 or more processes"),
    Rule("DISTILL.TEACHER.CACHE_MB", _at_least(0), "0 or more megabytes"),
    Rule("DISTILL.TEACHER.SCALE", _is_positive, "a positive factor"),
    Rule("INPUT.MIN_SIZE_TRAIN", _is_size, "a size in pixels, or 0 for no resizing"),
    Rule("INPUT.MIN_SIZE_TRAIN_SAMPLING", _one_of("choice", "range"), '"choice" or "range"'),
    Rule("INPUT.RANDOM_FLIP", _one_of(*FLIPS), f"one of {', '.join(FLIPS)}"),
    Rule("INPUT.MAX_SIZE_TRAIN", _at_least(1), "1 or more pixels"),
    Rule("INPUT.MIN_SIZE_TEST", _at_least(0), "a size in pixels, or 0 for no resizing"),
    Rule("INPUT.MAX_SIZE_TEST", _at_least(1), "1 or more pixels"),
    Rule("INPUT.MAX_BAD_FRACTION", lambda value: _is_finite(value) and 0 <= value <= 1, "a share from 0 to 1"),
    Rule("DISTILL.UNLABELED.FRACTION", lambda value: _is_finite(value) and 0 < value < 1, "between 0 and 1"),
    Rule("DISTILL.UNLABELED.WEIGHT", _at_least(0), "0 or more"),
    Rule("DISTILL.UNTIL", lambda value: _is_finite(value) and 0 < value <= 1, "a share above 0 and up to 1"),
    Rule("DISTILL.WEIGHTS", _one_of("fixed", "auto"), '"fixed" or "auto"'),
    Rule("DISTILL.AUTO.PERIOD", _at_least(1), "1 or more iterations between two measurements"),
    Rule("DISTILL.AUTO.MOMENTUM", lambda value: _is_finite(value) and 0 <= value < 1, "0 or more and below 1"),
    Rule("DISTILL.WARMUP_ITERS", _at_least(0), "0 or more iterations"),
    Rule("DISTILL.SKIP_NONFINITE", _at_least(0), "0 or more steps"),
)


def check_values(cfg: CfgNode) -> None:
    """Check all values of a config that a training reads.

    Raises:
        GDetKDError: a value is invalid. The message names all invalid values.
    """
    wrong = [
        f"{rule.key} is {get_key(cfg, rule.key)!r} and must be {rule.wanted}"
        for rule in RULES
        if not rule.holds(get_key(cfg, rule.key))
    ]
    wrong += _wrong_weights(cfg) + _wrong_patience(cfg) + _wrong_transfer(cfg) + _wrong_training(cfg)
    _refuse(wrong + missing_packages(cfg) + _wrong_parts(cfg))


def check_parts(cfg: CfgNode) -> None:
    """Check what an evaluation needs, too: names of parts, levels, TEST.COCO_EVAL, and what GDetKD does not support.

    Raises:
        GDetKDError: a value is invalid. The message names all invalid values.
    """
    _refuse(_wrong_parts(cfg))


def _wrong_parts(cfg: CfgNode) -> List[str]:
    return wrong_parts(cfg) + _unsupported(cfg) + wrong_implementation(cfg)


def _refuse(wrong: List[str]) -> None:
    if wrong:
        raise GDetKDError(
            f"The config has invalid values: {'; '.join(wrong)}. Correct them in the file or on the command line."
        )


def _wrong_weights(cfg: CfgNode) -> List[str]:
    known = [name for name in cfg.DISTILL.LOSSES if "WEIGHT" in cfg.DISTILL.get(name, ())]
    return [
        f"DISTILL.{name}.{key} is {cfg.DISTILL[name][key]!r} and must be 0 or more"
        for name in known
        for key in ("WEIGHT", "SHARE")
        if not _at_least(0)(cfg.DISTILL[name][key])
    ]


def _wrong_patience(cfg: CfgNode) -> List[str]:
    """Check that a training with TEST.PATIENCE is evaluated while it runs."""
    patience, wrong = cfg.TEST.PATIENCE, []
    if patience > 0 and not cfg.DATASETS.TEST:
        wrong.append(f"TEST.PATIENCE is {patience}, but DATASETS.TEST is empty: name a dataset to evaluate on")
    if patience > 0 and cfg.TEST.EVAL_PERIOD <= 0:
        wrong.append(
            f"TEST.PATIENCE is {patience}, but TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so there is no evaluation "
            "before the end: set it to a number of iterations"
        )
    return wrong


def _wrong_transfer(cfg: CfgNode) -> List[str]:
    """Check the teacher of head transfer. torchvision's classification layers have the background first."""
    if not (cfg.DISTILL.HEAD_TRANSFER and cfg.DISTILL.TEACHER.CONFIG_FILE.startswith(TORCHVISION)):
        return []
    return [
        "DISTILL.HEAD_TRANSFER is True, but the classes of a torchvision teacher have another order than Detectron2's: "
        "set it to False"
    ]


def _wrong_training(cfg: CfgNode) -> List[str]:
    """Find what fails in training alone."""
    wrong = []
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    has_range = not isinstance(sizes, (tuple, list)) or len(sizes) == 2
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not has_range:
        wrong.append(
            f'INPUT.MIN_SIZE_TRAIN_SAMPLING is "range", but INPUT.MIN_SIZE_TRAIN has {len(sizes)} sizes: give the '
            'smallest and the largest, or set the sampling to "choice"'
        )
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE not in CROPS:
        wrong.append(f"INPUT.CROP.TYPE is {cfg.INPUT.CROP.TYPE!r} and must be one of {', '.join(CROPS)}")
    if needs_proposals(cfg) and cfg.DISTILL.INSIGHT.PERIOD:
        wrong.append(
            "DISTILL.INSIGHT.PERIOD needs a student that finds its own proposals, but MODEL.PROPOSAL_GENERATOR.NAME is "
            f"'{PRECOMPUTED}': set the period to 0"
        )
    return wrong


def _unsupported(cfg: CfgNode) -> List[str]:
    wrong = []
    if cfg.TEST.AUG.ENABLED:
        wrong.append("TEST.AUG.ENABLED is True, but GDetKD does not support test-time augmentation: set it to False")
    if cfg.TEST.DETECTIONS_PER_IMAGE == -1 and student_architecture(cfg) in DENSE:
        wrong.append(
            f"TEST.DETECTIONS_PER_IMAGE is -1, which makes a {student_architecture(cfg)} leave out a detection: set it "
            "to a number"
        )
    return wrong
