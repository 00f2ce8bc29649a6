"""Log the scalars that the distillation losses, their weights and the teacher report."""

from detectron2.engine import HookBase

from ..distiller import GDetKD
from .schedule import LossSchedule

# Steps between two logs, as for Detectron2's metrics. Each log waits for the device.
PERIOD = 20


class LossScalars(HookBase):
    """Log `DistillLoss.scalars` of every loss, such as "sgfi/attention", the schedule's weights, and the share of the
    teacher's features that were kept from earlier steps.

    After DISTILL.UNTIL there is nothing to log. The hook must stand before the hook that writes metrics.
    """

    def __init__(self, distiller: GDetKD, schedule: LossSchedule) -> None:
        self._distiller = distiller
        self._schedule = schedule

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % PERIOD or not self._distiller.distils:
            return
        scalars = self._schedule.scalars()
        for loss_name, loss in self._distiller.losses.items():
            scalars.update({f"{loss_name.lower()}/{name}": value for name, value in loss.scalars().items()})
        cache = self._distiller.teacher.cache if self._distiller.losses else None
        if cache is not None:
            scalars["teacher/kept"] = cache.take_share()
        self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
