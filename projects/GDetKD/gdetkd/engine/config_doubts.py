"""Find values of a config that are valid alone, but do not fit together."""

from typing import List

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
    """Detectron2's warm-up rises to the rate that holds at its end, so a later rate is never reached."""
    solver = cfg.SOLVER
    steps = solver.STEPS if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
    end, key = min([(solver.MAX_ITER, "SOLVER.MAX_ITER"), *((step, "SOLVER.STEPS") for step in steps)])
    if solver.WARMUP_ITERS < end:
        return ""
    return (
        f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, but {key} lowers the learning rate or ends the training at "
        f"iteration {end}. So the training never reaches SOLVER.BASE_LR {solver.BASE_LR:g}. Set SOLVER.WARMUP_ITERS to "
        "a small part of the training, such as a tenth."
    )


def _warmup_of_terms(cfg: CfgNode) -> str:
    nodes = {f"DISTILL.{name}": cfg.DISTILL[name] for name in cfg.DISTILL.LOSSES}
    lengths = {key: node.WARMUP_ITERS for key, node in {"DISTILL": cfg.DISTILL, **nodes}.items()}
    end = cfg.DISTILL.UNTIL * cfg.SOLVER.MAX_ITER
    late = [f"{key}.WARMUP_ITERS {length}" for key, length in lengths.items() if length > end]
    if not (nodes and late):
        return ""
    return (
        f"{' and '.join(late)}: the distillation ends at iteration {end:.0f} (SOLVER.MAX_ITER, DISTILL.UNTIL), before "
        "the losses have their full weights. Set a smaller number, or 0 for no warm-up."
    )


def _other_test_size(cfg: CfgNode) -> str:
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = sizes if isinstance(sizes, (tuple, list)) else (sizes,)
    test = cfg.INPUT.MIN_SIZE_TEST
    if not cfg.DATASETS.TEST or not test or not sizes or not all(sizes):  # 0 is the size of the file
        return ""
    if min(sizes) / MOST_SIZE_RATIO <= test <= MOST_SIZE_RATIO * max(sizes):
        return ""
    return (
        f"INPUT.MIN_SIZE_TEST is {test}, but the student trains on images with a short side of "
        f"{' to '.join(map(str, sorted({min(sizes), max(sizes)})))} pixels (INPUT.MIN_SIZE_TRAIN). Objects of another "
        "size than in training are found badly, so the AP would say little. Give both a similar size."
    )
