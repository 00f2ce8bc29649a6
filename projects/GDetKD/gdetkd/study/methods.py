"""Turn the name of a method into config changes. A method is:

- "none": the student alone, the baseline;
- the name of a loss;
- "head_transfer";
- "GDetKD": the losses and head transfer that the config asks for;
- "unlabeled": also train on DATASETS.UNLABELED. All other methods use labelled images only.
- "pseudo": the same without distillation.

All except "none" and "pseudo" can be joined by "+". "GDetKD+PKD" is what the config asks for, and PKD.
"""

from typing import List

from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..losses import DISTILL_LOSS_REGISTRY
from .run import PLAIN

BASELINE, CONFIGURED, HEAD_TRANSFER = "none", "GDetKD", "head_transfer"
UNLABELED, PSEUDO = "unlabeled", "pseudo"
WITH_UNLABELED = f"{CONFIGURED}+{UNLABELED}"


def method_opts(method: str, cfg: CfgNode) -> List[str]:
    """Return the KEY VALUE changes that turn a config into the config of a method.

    Args:
        cfg: the config that defines "GDetKD".

    Raises:
        GDetKDError: a part of the name is not a loss, appears twice, or needs unlabelled images that the config lacks.
    """
    names = [UNLABELED if name == PSEUDO else name for name in method.split("+")]
    uses_unlabeled = UNLABELED in names
    is_joined = len(names) > 1 and (BASELINE in names or PSEUDO in method.split("+"))
    if names.count(UNLABELED) > 1 or (uses_unlabeled and is_joined):
        raise GDetKDError(
            f"There is no method {method!r}: {BASELINE} and {PSEUDO} stand alone, and {UNLABELED} appears once. "
            f"{PSEUDO} is {UNLABELED} without a distillation term."
        )
    if uses_unlabeled and not cfg.DATASETS.UNLABELED:
        raise GDetKDError(
            f"The method {method!r} trains on images without labels, but DATASETS.UNLABELED is empty. Name a dataset "
            "of kind `pseudo` there (docs/unlabeled.md)."
        )
    without = ["DATASETS.UNLABELED", "()"] if cfg.DATASETS.UNLABELED and not uses_unlabeled else []
    parts = [name for name in names if name != UNLABELED]
    return [*without, *_opts_of(parts, method, cfg)]


def _opts_of(names: List[str], method: str, cfg: CfgNode) -> List[str]:
    if names in ([], [BASELINE]):
        return list(PLAIN)
    if names == [CONFIGURED]:
        return []
    parts = [part for name in names for part in (configured_parts(cfg) if name == CONFIGURED else [name])]
    known = [name for name, _ in DISTILL_LOSS_REGISTRY]
    for part in parts:
        if part not in (*known, HEAD_TRANSFER) or parts.count(part) > 1:
            raise GDetKDError(
                f"There is no method {method!r}: {part!r} is not a loss, or appears twice. Choose from {BASELINE}, "
                f"{CONFIGURED}, {HEAD_TRANSFER}, {UNLABELED}, {PSEUDO}, {', '.join(known)}; all except {BASELINE} can "
                "be joined by '+'."
            )
    losses = tuple(part for part in parts if part != HEAD_TRANSFER)
    return ["DISTILL.LOSSES", str(losses), "DISTILL.HEAD_TRANSFER", str(HEAD_TRANSFER in parts)]


def configured_parts(cfg: CfgNode) -> List[str]:
    """Return the losses that a config asks for, and head transfer if it does."""
    return [*cfg.DISTILL.LOSSES, *([HEAD_TRANSFER] if cfg.DISTILL.HEAD_TRANSFER else [])]


def ablation(cfg: CfgNode) -> List[str]:
    """Return the methods of an ablation: the baseline, each component alone, then components added one by one.

    Raises:
        GDetKDError: the config asks for no component.
    """
    parts = configured_parts(cfg)
    if not parts:
        raise GDetKDError(
            "There is nothing to ablate: DISTILL.LOSSES is empty and DISTILL.HEAD_TRANSFER is off. Name losses."
        )
    joined = ["+".join(parts[:count]) for count in range(2, len(parts))]
    return [BASELINE, *parts, *joined, *([CONFIGURED] if len(parts) > 1 else [])]
