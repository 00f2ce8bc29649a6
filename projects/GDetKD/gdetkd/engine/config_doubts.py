"""Find values of a config that are valid alone, but do not fit together."""

import math
from typing import List, Tuple

from detectron2.config import CfgNode

# The largest ratio between the sizes of training and test images that is no mistake. The value is ours.
MOST_SIZE_RATIO = 1.5


def config_doubts(cfg: CfgNode) -> List[str]:
    """Return a warning for each pair of values that does not fit. The training would run, but be worth little.

    Args:
        cfg: a config whose values are valid alone, scaled to the number of processes.
    """
    doubts = [_warmup_of_rate(cfg), _warmup_of_terms(cfg), _other_test_size(cfg)]
    return [doubt for doubt in doubts if doubt]


def _warmup_of_rate(cfg: CfgNode) -> str:
    """Check that the warm-up ends before the rate falls: Detectron2's rises to the rate that holds at its end."""
    solver = cfg.SOLVER
    steps = solver.STEPS if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
    end = min([solver.MAX_ITER, *steps])
    if solver.WARMUP_ITERS < end or solver.WARMUP_FACTOR >= 1:
        return ""
    until = "the training ends at" if end == solver.MAX_ITER else "SOLVER.STEPS lowers the learning rate at"
    return (
        f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, but {until} iteration {end}{_scaled(cfg)}. So the training "
        f"never reaches SOLVER.BASE_LR {solver.BASE_LR:g}. Set SOLVER.WARMUP_ITERS to a small part of the training, "
        "such as a tenth."
    )


def _warmup_of_terms(cfg: CfgNode) -> str:
    nodes = {f"DISTILL.{name}": cfg.DISTILL[name] for name in cfg.DISTILL.LOSSES}
    lengths = {key: node.WARMUP_ITERS for key, node in {"DISTILL": cfg.DISTILL, **nodes}.items()}
    end = math.ceil(cfg.DISTILL.UNTIL * cfg.SOLVER.MAX_ITER)
    late = [f"{key}.WARMUP_ITERS {length}" for key, length in lengths.items() if length > end]
    if not (nodes and late):
        return ""
    return (
        f"{' and '.join(late)}: the distillation ends at iteration {end}{_scaled(cfg)}, before the losses have their "
        "full weights. Set a smaller number, or 0 for no warm-up."
    )


def _scaled(cfg: CfgNode) -> str:
    return " (scaled by SOLVER.REFERENCE_WORLD_SIZE)" if cfg.SOLVER.REFERENCE_WORLD_SIZE else ""


def sizes_in_training(cfg: CfgNode) -> Tuple[int, ...]:
    """Return the short sides, in pixels, to which training resizes whole images.

    There are none if an image may keep the size of its file, or if training crops: a crop shows its objects at another
    scale.
    """
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    return () if cfg.INPUT.CROP.ENABLED or not all(sizes) else sizes


def _other_test_size(cfg: CfgNode) -> str:
    sizes, test = sizes_in_training(cfg), cfg.INPUT.MIN_SIZE_TEST
    if not cfg.DATASETS.TEST or not test or not sizes:  # 0 is the size of the file
        return ""
    if min(sizes) / MOST_SIZE_RATIO <= test <= MOST_SIZE_RATIO * max(sizes):
        return ""
    return (
        f"INPUT.MIN_SIZE_TEST is {test}, but the student trains on images with a short side of "
        f"{' to '.join(map(str, sorted({min(sizes), max(sizes)})))} pixels (INPUT.MIN_SIZE_TRAIN). Objects of another "
        "size than in training are found badly, so the AP would say little. Give both a similar size."
    )
