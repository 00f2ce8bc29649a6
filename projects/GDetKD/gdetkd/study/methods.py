"""The methods of a comparison, by their names.

A method is "none" (the student alone, the baseline), the name of a loss, "head_transfer", or "GDetKD": what the config
itself asks for. All but the first may be joined by "+": "GDetKD+PKD" is what the config asks for, and PKD.
"""

from typing import List

from detectron2.config import CfgNode

from ..errors import GDetKDError
from ..losses import DISTILL_LOSS_REGISTRY
from .run import PLAIN

BASELINE, CONFIGURED, HEAD_TRANSFER = "none", "GDetKD", "head_transfer"


def method_opts(method: str, cfg: CfgNode) -> List[str]:
    """Return the KEY VALUE changes that turn a config into that of a method.

    Args:
        cfg: the config, which says what "GDetKD" is.

    Raises:
        GDetKDError: it names something that is no loss, or the same twice.
    """
    if method == BASELINE:
        return list(PLAIN)
    if method == CONFIGURED:
        return []
    parts = [part for name in method.split("+") for part in (configured_parts(cfg) if name == CONFIGURED else [name])]
    known = [name for name, _ in DISTILL_LOSS_REGISTRY]
    for part in parts:
        if part not in (*known, HEAD_TRANSFER) or parts.count(part) > 1:
            raise GDetKDError(
                f"There is no method {method!r}: {part!r} is no loss, or stands twice. There are {BASELINE}, "
                f"{CONFIGURED}, {HEAD_TRANSFER}, {', '.join(known)}, and all but the first joined by '+'."
            )
    losses = tuple(part for part in parts if part != HEAD_TRANSFER)
    return ["DISTILL.LOSSES", str(losses), "DISTILL.HEAD_TRANSFER", str(HEAD_TRANSFER in parts)]


def configured_parts(cfg: CfgNode) -> List[str]:
    """Return the losses that a config asks for, and head transfer if it does."""
    return [*cfg.DISTILL.LOSSES, *([HEAD_TRANSFER] if cfg.DISTILL.HEAD_TRANSFER else [])]


def ablation(cfg: CfgNode) -> List[str]:
    """Return the components of the configured method: each alone, then one after another added, up to all of them.

    Raises:
        GDetKDError: the config asks for no component.
    """
    parts = configured_parts(cfg)
    if not parts:
        raise GDetKDError("There is nothing to ablate: DISTILL.LOSSES is empty and DISTILL.HEAD_TRANSFER is off.")
    joined = ["+".join(parts[:count]) for count in range(2, len(parts))]
    return [BASELINE, *parts, *joined, *([CONFIGURED] if len(parts) > 1 else [])]
