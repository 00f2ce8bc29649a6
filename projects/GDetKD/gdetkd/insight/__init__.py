"""Show what distillation does to a student: which levels match, which classes look alike, who finds which object."""

import logging
from typing import Any

from ..engine.extensions import EXTENSIONS, ExtraHooks

logger = logging.getLogger(__name__)


def hooks_of(trainer: Any) -> ExtraHooks:
    """Return the hooks that DISTILL.INSIGHT.PERIOD adds to a `DistillTrainer`."""
    if trainer.cfg.DISTILL.INSIGHT.PERIOD <= 0:
        return ExtraHooks()
    if trainer.distiller is None or not trainer.distiller.losses:
        logger.info("DISTILL.INSIGHT.PERIOD has no effect: this run trains without distillation losses.")
        return ExtraHooks()
    from .hook import Insight, LastPage  # imports matplotlib, which takes a second

    insight = Insight(trainer.cfg, trainer.distiller, trainer.schedule)
    insight.attach(trainer.model)
    return ExtraHooks([insight], [LastPage(insight)])


EXTENSIONS.append(hooks_of)
