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
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, mean_squared_error
from .roi_align import pool_all_levels

logger = logging.getLogger(__name__)

STRIDE = 2
# Two 3x3 convolutions of stride 2 without padding need at least this many cells.
MIN_POOLED_SIZE = 7
# Looks in a row at equal alphas before a warning.
PATIENCE = 5


def level_attention(student_keys: torch.Tensor, teacher_keys: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """How much each student level resembles the teacher's region: softmax over the *levels*.

    Args:
        student_keys: (N, L, D)
        teacher_keys: (N, D)
        tau: temperature, a positive scalar.

    Returns:
        (N, L), each row summing to 1.
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
    """The equations as they stand: aggregate the adapted student levels, compare with the teacher.

    Args:
        student_rois: (N, L, C, H, W), adapted to the teacher's channels.
        teacher_rois: (N, C, H, W)
        student_keys: (N, L, D)
        teacher_keys: (N, D)
        tau: temperature, a positive scalar.

    Returns:
        The mean squared error over N, C, H, W (0 for N = 0), and the attention (N, L).
    """
    alpha = level_attention(student_keys, teacher_keys, tau)
    aggregated = torch.einsum("nl,nlchw->nchw", alpha, student_rois)
    return mean_squared_error(aggregated, teacher_rois), alpha


class _ConvolveAndPass(Function):
    """A convolution of stride 2 without padding, and its input once more, to be used further.

    Regions on all levels are the largest tensor of a step. Autograd would make a gradient of it for each of the two
    uses, and a third for their sum; here the one is added to the other in place.
    """

    @staticmethod
    def forward(
        ctx: Any, rois: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rois, weight)
        return F.conv2d(rois, weight, bias, stride=STRIDE), rois.view_as(rois)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden: torch.Tensor, of_rois: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        rois, weight = ctx.saved_tensors
        stride, padding, dilation = [STRIDE] * 2, [0, 0], [1, 1]
        gradients = torch.ops.aten.convolution_backward(
            *(of_hidden, rois, weight, [len(weight)], stride, padding, dilation, False, [0, 0], 1, [True] * 3)
        )
        return gradients[0].add_(of_rois), *gradients[1:]


class RegionEmbedding(nn.Module):
    """f_embed: two 3x3 convolutions of stride 2, each followed by ReLU; one for both sides.

    Args:
        in_channels: C_T.
        channels: of the two convolutions' outputs; the second is D.
        negative_slope: of the ReLUs. The method has 0. With more, a ReLU that is dead for all regions can come back.

    For the student, f_adap (1x1) is folded into the first of them. Both are linear and there is no padding, so
    this is exact, and nothing of size (N, L, C_T, H, W) has to be made.
    """

    def __init__(self, in_channels: int, channels: Tuple[int, int], negative_slope: float = 0.0) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.conv1 = nn.Conv2d(in_channels, channels[0], kernel_size=3, stride=STRIDE)
        self.conv2 = nn.Conv2d(channels[0], channels[1], kernel_size=3, stride=STRIDE)

    def forward(self, rois: torch.Tensor) -> torch.Tensor:
        """(N, C_T, H, W) -> (N, D)"""
        return self._finish(self.conv1(rois))

    def forward_adapted(self, rois: torch.Tensor, adapter: nn.Conv2d) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same of `adapter(rois)`: (N, C_S, H, W) -> (N, D), and the regions again, for their further use."""
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
    """Owns f_adap, f_embed and tau.

    Raises:
        GDetKDError: the teacher pools its regions to fewer than 7x7 cells, or a key of DISTILL.SGFI is out of range.
    """

    default_weight = 1.0  # source: a re-implementation
    needs = frozenset({"pooled"})
    chooses_levels = True
    without_decay = frozenset({"log_tau"})  # decay would pull the temperature towards 1

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # RoIAlign samples per bin and axis on the student's pyramid. The teacher's comes from its own box head.
        node.SAMPLING_RATIO = 2
        # Output channels of the two 3x3 convolutions of f_embed. Source: a re-implementation.
        node.EMBED_CHANNELS = (128, 64)
        # Initial temperature of the softmax over levels; it is learned and stays positive.
        node.TAU = 1.0
        # Slope of the embedding's ReLUs below 0. The method has plain ReLUs, slope 0. Large steps (SOLVER.BASE_LR) can
        # make the embedding 0 for every region. The log warns of that, and a small slope leads out of it.
        node.NEGATIVE_SLOPE = 0.0

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        if min(teacher_spec.pooled_size) < MIN_POOLED_SIZE:
            raise GDetKDError(
                f"SGFI embeds regions with two strided convolutions, which need {MIN_POOLED_SIZE}x{MIN_POOLED_SIZE} "
                f"cells; the teacher pools to {teacher_spec.pooled_size} (MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)."
            )
        if cfg.DISTILL.SGFI.TAU <= 0:
            raise GDetKDError(f"DISTILL.SGFI.TAU is a temperature and must be positive, not {cfg.DISTILL.SGFI.TAU}.")
        if cfg.DISTILL.SGFI.SAMPLING_RATIO < 1:
            raise GDetKDError(f"DISTILL.SGFI.SAMPLING_RATIO must be at least 1, not {cfg.DISTILL.SGFI.SAMPLING_RATIO}.")
        self.size, self.sampling_ratio = teacher_spec.pooled_size, cfg.DISTILL.SGFI.SAMPLING_RATIO
        self.adapter = nn.Conv2d(student_spec.channels, teacher_spec.channels, kernel_size=1)
        slope = cfg.DISTILL.SGFI.NEGATIVE_SLOPE
        if not 0 <= slope < 1:
            raise GDetKDError(f"DISTILL.SGFI.NEGATIVE_SLOPE must be at least 0 and less than 1, not {slope}.")
        self.embed = RegionEmbedding(teacher_spec.channels, tuple(cfg.DISTILL.SGFI.EMBED_CHANNELS), slope)
        # The logarithm is what is learned, so that tau stays positive.
        self.log_tau = nn.Parameter(torch.tensor(math.log(cfg.DISTILL.SGFI.TAU)))
        self._last_attention: Optional[torch.Tensor] = None  # (N, L) of the last step
        self._times_equal = 0

    @property
    def tau(self) -> torch.Tensor:
        return self.log_tau.exp()

    def pool(self, student: DetectorOutputs) -> torch.Tensor:
        """Return (N, L, C_S, H, W): each region on each of the student's levels, of the teacher's pooled size."""
        maps, strides = list(student.pyramid.values()), list(student.strides.values())
        return pool_all_levels(maps, strides, student.regions, self.size, self.sampling_ratio)

    def level_attention(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return self._attend(self.pool(student), full_precision(teacher.pooled))[0]

    def scalars(self) -> Dict[str, float]:
        """Return the mean over regions of the largest alpha: 1 is a single level, 1 / L is no choice at all.

        If the alphas of all regions were equal to the last digit several times in a row, warn: the embedding is 0 for
        every region, its ReLUs are dead, and no gradient revives them. SGFI then imitates the mean of the levels.
        """
        alpha = self._last_attention
        if alpha is None or len(alpha) == 0 or alpha.shape[1] == 1:
            return {}
        largest = alpha.amax(dim=1)
        chosen, spread = torch.stack([largest.mean(), (largest - alpha.amin(dim=1)).max()]).tolist()
        self._times_equal = self._times_equal + 1 if spread == 0 else 0
        if self._times_equal == PATIENCE:
            logger.warning(
                "SGFI no longer chooses among the student's levels: its embedding is 0 for every region. It now "
                "imitates the mean of the %d levels. Steps were too large for its ReLUs: lower SOLVER.BASE_LR, or "
                "set DISTILL.SGFI.NEGATIVE_SLOPE to 0.01, and start anew.",
                alpha.shape[1],
            )
        return {"attention": chosen}

    def _attend(self, rois: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the alphas, and the regions again for their further use."""
        keys, again = self.embed.forward_adapted(rois.flatten(0, 1), self.adapter)
        keys = keys.view(*rois.shape[:2], keys.shape[1])
        return level_attention(keys, self.embed(target), self.tau), again.view(rois.shape)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        return self.imitate(self.pool(student), full_precision(teacher.pooled))

    def imitate(self, rois: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the term for the student's regions (N, L, C_S, H, W) and the teacher's (N, C_T, H, W)."""
        alpha, rois = self._attend(rois, target)
        self._last_attention = alpha.detach()  # (N, L)
        # The alphas sum to 1, so adapting the aggregate equals aggregating the adapted. Cells are rows, (N H W, C),
        # in which the sum over levels is one product and the adapter another.
        levels = rois.permute(0, 1, 3, 4, 2).flatten(2)  # (N, L, H W C_S), no copy
        aggregated = torch.bmm(alpha[:, None], levels).view(-1, rois.shape[2])
        adapted = F.linear(aggregated, self.adapter.weight[:, :, 0, 0], self.adapter.bias)
        return mean_squared_error(adapted, target.permute(0, 2, 3, 1).reshape(adapted.shape))
