"""What distillation does to a student, measured: which levels match, which classes are alike, who finds what."""

import logging
from typing import Any

from ..engine.extensions import EXTENSIONS, ExtraHooks

logger = logging.getLogger(__name__)


def hooks_of(trainer: Any) -> ExtraHooks:
    """Return the hooks of DISTILL.VIS_PERIOD for a `DistillTrainer`."""
    if trainer.cfg.DISTILL.VIS_PERIOD <= 0:
        return ExtraHooks()
    if trainer.distiller is None or not trainer.distiller.losses:
        logger.info("DISTILL.VIS_PERIOD: there is no distillation to look at.")
        return ExtraHooks()
    from .hook import Insight, LastPage  # imports matplotlib, which takes a second

    insight = Insight(trainer.cfg, trainer.distiller, trainer.schedule)
    insight.attach(trainer.model)
    return ExtraHooks([insight], [LastPage(insight)])


EXTENSIONS.append(hooks_of)
