"""Semantic-guided feature imitation, SGFI (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482).

Shapes: N regions, L student levels, C_S and C_T channels, (H, W) the pooled size, D the key width.
"""

import logging
import math
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..errors import GDetKDError
from ..roi_align import pool_all_levels
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, mean_squared_error

logger = logging.getLogger(__name__)

STRIDE = 2
# Smallest pooled size that two 3x3 convolutions of stride 2 without padding can take.
MIN_POOLED_SIZE = 7
# Number of equal attentions in a row, as `SGFI.scalars` sees them, before a warning.
PATIENCE = 5


def level_attention(student_keys: torch.Tensor, teacher_keys: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Weigh the student's levels by their similarity to the teacher's region: a softmax over the levels.

    For example, a region has the similarities 2 and 0 on two levels. A higher temperature weighs them more evenly:

        >>> student_keys, teacher_keys = torch.tensor([[[2.0], [0.0]]]), torch.tensor([[1.0]])
        >>> level_attention(student_keys, teacher_keys, tau=torch.tensor(1.0))
        tensor([[0.8808, 0.1192]])
        >>> level_attention(student_keys, teacher_keys, tau=torch.tensor(4.0))
        tensor([[0.6225, 0.3775]])

    Args:
        student_keys: (N, L, D)
        teacher_keys: (N, D)
        tau: temperature, a positive scalar.

    Returns:
        attention (N, L); a row sums to 1.
    """
    similarity = torch.einsum("nld,nd->nl", student_keys, teacher_keys)
    return torch.softmax(similarity / tau, dim=1)


def semantic_guided_imitation(
    student_rois: torch.Tensor,
    teacher_rois: torch.Tensor,
    student_keys: torch.Tensor,
    teacher_keys: torch.Tensor,
    tau: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Aggregate the student's levels by attention, and compare the result with the teacher's region.

    These are the paper's equations as written. `SGFI` computes them faster.

    Args:
        student_rois: (N, L, C, H, W), adapted to the teacher's channels.
        teacher_rois: (N, C, H, W)
        student_keys: (N, L, D)
        teacher_keys: (N, D)
        tau: temperature, a positive scalar.

    Returns:
        mean squared error over N, C, H, W (0 for N = 0), and the attention alpha (N, L).
    """
    alpha = level_attention(student_keys, teacher_keys, tau)
    aggregated = torch.einsum("nl,nlchw->nchw", alpha, student_rois)
    return mean_squared_error(aggregated, teacher_rois), alpha


class _ConvolveAndPass(Function):
    """Convolve with stride 2 and without padding. Return the result, and the input again for its second use.

    The regions on all levels are the largest tensor of a step. Autograd would make a gradient for each of the two uses,
    and a third for the sum. This function adds one gradient to the other in place.
    """

    @staticmethod
    def forward(
        ctx: Any, rois: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rois, weight)
        return F.conv2d(rois, weight, bias, stride=STRIDE), rois.view_as(rois)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: torch.Tensor, grad_passed: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        rois, weight = ctx.saved_tensors
        stride, padding, dilation = [STRIDE] * 2, [0, 0], [1, 1]
        grad_rois, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_hidden, rois, weight, [len(weight)], stride, padding, dilation, False, [0, 0], 1, [True] * 3
        )
        return grad_rois.add_(grad_passed), grad_weight, grad_bias


class RegionEmbedding(nn.Module):
    """Embed regions by two 3x3 convolutions of stride 2 with ReLU. Student and teacher share it (f_embed in the paper).

    For the student, the 1x1 adapter (f_adap) is folded into the first convolution. Both are linear and there is no
    padding, so the result is exact. The adapted regions (N, L, C_T, H, W) are never made.

    Args:
        in_channels: C_T.
        channels: output channels of the two convolutions.
        negative_slope: slope of the ReLUs below 0. The paper has 0. With a positive slope, dead ReLUs can recover.
    """

    def __init__(self, in_channels: int, channels: Tuple[int, int], negative_slope: float = 0.0) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.conv1 = nn.Conv2d(in_channels, channels[0], kernel_size=3, stride=STRIDE)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size=3, stride=STRIDE)

    def forward(self, rois: torch.Tensor) -> torch.Tensor:
        """Return the keys (N, D) of regions (N, C_T, H, W)."""
        return self._finish(self.conv1(rois))

    def forward_adapted(self, rois: torch.Tensor, adapter: nn.Conv2d) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the keys (N, D) of `adapter(rois)`, and the rois (N, C_S, H, W) again for their second use."""
        weight = torch.einsum("ethw,ts->eshw", self.conv1.weight, adapter.weight[:, :, 0, 0])
        bias = self.conv1.bias + torch.einsum("ethw,t->e", self.conv1.weight, adapter.bias)
        hidden, rois = _ConvolveAndPass.apply(rois, weight, bias)
        return self._finish(hidden), rois

    def _finish(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._relu(self.conv2(self._relu(hidden))).flatten(start_dim=1)

    def _relu(self, values: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(values, self.negative_slope) if self.negative_slope else F.relu(values)


@DISTILL_LOSS_REGISTRY.register()
class SGFI(DistillLoss):
    """Compare regions by `semantic_guided_imitation`.

    The module has the adapter f_adap, the embedding f_embed and the temperature tau.

    Raises:
        GDetKDError: the teacher pools regions to fewer than 7x7 cells, or a key of DISTILL.SGFI is out of range.
    """

    default_weight = 1.0  # source: a re-implementation
    default_share = 4.0  # source: our choice (docs/weights.md)
    needs = frozenset({"pooled"})
    reads_regions_alone = True
    chooses_levels = True
    without_decay = frozenset({"log_tau"})  # weight decay would pull the temperature towards 1

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # RoIAlign samples per bin and axis on the student's pyramid. Source: our choice. 0 would make the number depend
        # on the region, as in Detectron2's box heads.
        node.SAMPLING_RATIO = 2
        # Output channels of the two 3x3 convolutions of f_embed. Source: a re-implementation.
        node.EMBED_CHANNELS = (128, 64)
        # Initial temperature of the softmax over levels. It is learned and stays positive. Source: a write-up.
        node.TAU = 1.0
        # Slope of the embedding's ReLUs below 0. The paper has plain ReLUs, slope 0. A large SOLVER.BASE_LR can make
        # the embedding 0 for every region. The log warns of that. A small slope avoids it.
        node.NEGATIVE_SLOPE = 0.0

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        if min(teacher_spec.pooled_size) < MIN_POOLED_SIZE:
            raise GDetKDError(
                f"SGFI needs regions of at least {MIN_POOLED_SIZE}x{MIN_POOLED_SIZE} cells, but the teacher pools to "
                f"{teacher_spec.pooled_size} (its MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION). Choose another teacher, or "
                "take SGFI out of DISTILL.LOSSES."
            )
        if cfg.DISTILL.SGFI.TAU <= 0:
            raise GDetKDError(f"DISTILL.SGFI.TAU is {cfg.DISTILL.SGFI.TAU}. Set it to a positive number.")
        if cfg.DISTILL.SGFI.SAMPLING_RATIO < 1:
            raise GDetKDError(
                f"DISTILL.SGFI.SAMPLING_RATIO is {cfg.DISTILL.SGFI.SAMPLING_RATIO}. Set it to at least 1."
            )
        self.size, self.sampling_ratio = teacher_spec.pooled_size, cfg.DISTILL.SGFI.SAMPLING_RATIO
        self.adapter = nn.Conv2d(student_spec.channels, teacher_spec.channels, kernel_size=1)
        slope = cfg.DISTILL.SGFI.NEGATIVE_SLOPE
        if not 0 <= slope < 1:
            raise GDetKDError(f"DISTILL.SGFI.NEGATIVE_SLOPE is {slope}. Set it to at least 0 and less than 1.")
        self.embed = RegionEmbedding(teacher_spec.channels, tuple(cfg.DISTILL.SGFI.EMBED_CHANNELS), slope)
        # The logarithm of tau is learned, so that tau stays positive.
        self.log_tau = nn.Parameter(torch.tensor(math.log(cfg.DISTILL.SGFI.TAU)))
        self._last_attention: Optional[torch.Tensor] = None  # (N, L) of the last step
        self._times_equal = 0

    @property
    def tau(self) -> torch.Tensor:
        return self.log_tau.exp()

    def pool(self, student: DetectorOutputs) -> torch.Tensor:
        """Pool each region on each of the student's levels, to the teacher's pooled size: (N, L, C_S, H, W)."""
        maps, strides = list(student.pyramid.values()), list(student.strides.values())
        return pool_all_levels(maps, strides, student.regions, self.size, self.sampling_ratio)

    def level_attention(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return self._attend(self.pool(student), full_precision(teacher.pooled))[0]

    def scalars(self) -> Dict[str, float]:
        """Return the mean over regions of the largest alpha: 1 means a single level, 1 / L means equal levels.

        Warn if the alphas of all regions are exactly equal several times in a row. Then the embedding is 0 for every
        region. Its ReLUs are dead, no gradient revives them, and SGFI imitates the mean of the levels.
        """
        alpha = self._last_attention
        if alpha is None or len(alpha) == 0 or alpha.shape[1] == 1:
            return {}
        largest = alpha.amax(dim=1)
        chosen, spread = torch.stack([largest.mean(), (largest - alpha.amin(dim=1)).max()]).tolist()
        self._times_equal = self._times_equal + 1 if spread == 0 else 0
        if self._times_equal == PATIENCE:
            logger.warning(
                "SGFI no longer chooses among the student's levels, because its embedding is 0 for every region. It "
                "now imitates the mean of the %d levels. The learning rate was too high for its ReLUs. Lower "
                "SOLVER.BASE_LR, or set DISTILL.SGFI.NEGATIVE_SLOPE to 0.01, and start a new run.",
                alpha.shape[1],
            )
        return {"attention": chosen}

    def _attend(self, rois: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the attention alpha (N, L), and the rois again for their second use."""
        keys, passed = self.embed.forward_adapted(rois.flatten(0, 1), self.adapter)
        keys = keys.view(*rois.shape[:2], keys.shape[1])
        return level_attention(keys, self.embed(target), self.tau), passed.view(rois.shape)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return self.imitate(self.pool(student), full_precision(teacher.pooled))

    def imitate(self, rois: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the term for the student's regions (N, L, C_S, H, W) and the teacher's regions (N, C_T, H, W)."""
        alpha, rois = self._attend(rois, target)
        self._last_attention = alpha.detach()  # (N, L)
        # The alphas sum to 1, so the adapter can run after the aggregation, on a single level. With cells as rows
        # (N H W, C), the aggregation is one matrix product and the adapter another.
        levels = rois.permute(0, 1, 3, 4, 2).flatten(2)  # (N, L, H W C_S), no copy
        aggregated = torch.bmm(alpha[:, None], levels).view(-1, rois.shape[2])
        adapted = F.linear(aggregated, self.adapter.weight[:, :, 0, 0], self.adapter.bias)
        return mean_squared_error(adapted, target.permute(0, 2, 3, 1).reshape(adapted.shape))
