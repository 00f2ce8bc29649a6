"""Log the scalars that each distillation loss reports."""

from typing import Mapping

from detectron2.engine import HookBase

from ..losses import DistillLoss

# Steps between two logs, as for Detectron2's metrics. Each log waits for the device.
PERIOD = 20


class LossScalars(HookBase):
    """Log `DistillLoss.scalars` of every loss, as "sgfi/attention" for example.

    The hook must stand before the hook that writes metrics.
    """

    def __init__(self, losses: Mapping[str, DistillLoss]) -> None:
        self._losses = losses

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % PERIOD:
            return
        for loss_name, loss in self._losses.items():
            for name, value in loss.scalars().items():
                self.trainer.storage.put_scalar(f"{loss_name.lower()}/{name}", value, smoothing_hint=False)
