"""Says when SGFI no longer chooses among the student's levels."""

import logging

import torch
from detectron2.engine import HookBase

from ..losses.sgfi import SGFI

logger = logging.getLogger(__name__)

# Steps between two looks, Detectron2's between two lines of metrics; each waits for the device.
PERIOD = 20
# Looks in a row that find nothing chosen before it is said.
PATIENCE = 5


class AttentionWatch(HookBase):
    """Logs `sgfi/attention`, the mean over regions of the largest alpha: 1 is a single level, 1 / L none at all. Warns
    once when all regions' alphas have been equal for a while.

    Equal to the last digit, they are of an embedding that is 0 for every region, which no gradient leads out of: its
    ReLUs are dead. SGFI then imitates the mean of the levels.

    It must stand before the hook that writes metrics.
    """

    def __init__(self, sgfi: SGFI) -> None:
        self._sgfi = sgfi
        self._equal = 0

    def after_step(self) -> None:
        alpha = self._sgfi.last_attention
        if (self.trainer.iter + 1) % PERIOD or alpha is None or len(alpha) == 0 or alpha.shape[1] == 1:
            return
        largest = alpha.amax(dim=1)
        chosen, spread = torch.stack([largest.mean(), (largest - alpha.amin(dim=1)).max()]).tolist()
        self.trainer.storage.put_scalar("sgfi/attention", chosen, smoothing_hint=False)
        self._equal = self._equal + 1 if spread == 0 else 0
        if self._equal == PATIENCE:
            logger.warning(
                "SGFI no longer chooses among the student's levels: its embedding is 0 for every region, so that it "
                "imitates the mean of the %d levels from here on. Steps were too large for its ReLUs: lower "
                "SOLVER.BASE_LR, or set DISTILL.SGFI.NEGATIVE_SLOPE to 0.01, and start anew.",
                alpha.shape[1],
            )
