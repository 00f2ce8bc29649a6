"""Log the scalars that the distillation losses and their weights report."""

from typing import Mapping

from detectron2.engine import HookBase

from ..losses import DistillLoss
from .schedule import LossSchedule

# Steps between two logs, as for Detectron2's metrics. Each log waits for the device.
PERIOD = 20


class LossScalars(HookBase):
    """Log `DistillLoss.scalars` of every loss, as "sgfi/attention" for example, and the schedule's weights.

    The hook must stand before the hook that writes metrics.
    """

    def __init__(self, losses: Mapping[str, DistillLoss], schedule: LossSchedule) -> None:
        self._losses = losses
        self._schedule = schedule

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % PERIOD:
            return
        for loss_name, loss in self._losses.items():
            for name, value in loss.scalars().items():
                self.trainer.storage.put_scalar(f"{loss_name.lower()}/{name}", value, smoothing_hint=False)
        self.trainer.storage.put_scalars(smoothing_hint=False, **self._schedule.scalars())
