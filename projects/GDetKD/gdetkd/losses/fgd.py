"""Focal and global distillation: Yang, Li, Jiang, Gong, Yuan, Zhao and Yuan, "Focal and Global Knowledge Distillation
for Detectors", CVPR 2022.

Shapes: B images, C channels, (H, W) the cells of a level, G objects of an image.
"""

from typing import NamedTuple, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec
from .build import DISTILL_LOSS_REGISTRY
from .maps import MapLoss, adapters_where_widths_differ, covered_cells


class Attention(NamedTuple):
    """Spatial (B, H, W), of mean 1 over H and W, and of channels (B, C), of mean 1 over C."""

    spatial: torch.Tensor
    channel: torch.Tensor


def attention(maps: torch.Tensor, temperature: float) -> Attention:
    """Where, and in which channels, the absolute features (B, C, H, W) are large."""
    magnitude = maps.abs()
    spatial = torch.softmax(magnitude.mean(dim=1).flatten(1) / temperature, dim=1) * maps[0, 0].numel()
    channel = torch.softmax(magnitude.mean(dim=(2, 3)) / temperature, dim=1) * maps.shape[1]
    return Attention(spatial.view(len(maps), *maps.shape[-2:]), channel)


def scale_masks(gt_boxes: Sequence[torch.Tensor], stride: int, size: Sequence[int]) -> Tuple[torch.Tensor, ...]:
    """The masks of objects and of background, each times the scale mask.

    Args:
        gt_boxes: of each image, (G, 4) xyxy in pixels; G may be 0.
        stride: pixels per cell.
        size: (H, W).

    Returns:
        two of (B, H, W). A cell of objects has 1 over the number of cells of the smallest that it is in; one of the
        background 1 over the number of the image's background cells.
    """
    foreground, background = [], []
    for boxes in gt_boxes:
        rows, columns = covered_cells(boxes, stride, size)
        share = (rows.sum(dim=1) * columns.sum(dim=1)).to(boxes.dtype).reciprocal()
        cells = share[:, None, None] * (rows[:, :, None] & columns[:, None, :])
        cells = cells.amax(dim=0) if len(boxes) else boxes.new_zeros(tuple(size))
        empty = (cells == 0).to(boxes.dtype)
        foreground.append(cells)
        background.append(empty / empty.sum().clamp(min=1))
    return torch.stack(foreground), torch.stack(background)


def focal_imitation(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, teachers: Attention
) -> torch.Tensor:
    """Squared errors, weighted by mask and the teacher's attention, summed over C, H, W (L_fea, one of its terms).

    Args:
        student, teacher: (B, C, H, W), the student adapted to the teacher's channels.
        mask: (B, H, W)

    Returns:
        mean over B.
    """
    weight = (mask * teachers.spatial)[:, None] * teachers.channel[:, :, None, None]
    return (weight * (student - teacher) ** 2).sum() / len(student)


def attention_imitation(student: Attention, teacher: Attention) -> torch.Tensor:
    """Absolute differences of both attentions, summed over H, W and over C (L_at); mean over B."""
    spatial = (student.spatial - teacher.spatial).abs().sum()
    return (spatial + (student.channel - teacher.channel).abs().sum()) / len(student.channel)


class GlobalContext(nn.Module):
    """The GcBlock of section 3.2: adds to each cell what one attention over all cells gathers of the map.

    As the authors', it starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, kernel_size=1)
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.attend.weight)
        for zero in (self.attend.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(zero)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        weight = torch.softmax(self.attend(maps).flatten(1), dim=1)  # (B, H W)
        context = torch.einsum("bcx,bx->bc", maps.flatten(2), weight)
        return maps + self.expand(torch.relu(self.norm(self.reduce(context))))[:, :, None, None]


@DISTILL_LOSS_REGISTRY.register()
class FGD(MapLoss):
    """alpha and beta times `focal_imitation` of objects and background, gamma times `attention_imitation`, and lambda
    times the squared error of both sides' `GlobalContext` (sections 3.1, 3.2), summed over the levels that both have.

    Owns two `GlobalContext` of each level, and 1x1 adapters where widths differ.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the temperature is not positive.
    """

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # By the student's family, from the authors: factors on objects, background, attention and global relation, and
        # the temperature of the attentions.
        node.TWO_STAGE = CfgNode(dict(ALPHA=5e-5, BETA=2.5e-5, GAMMA=5e-5, LAMBDA=5e-7, TEMPERATURE=0.5))
        node.ANCHOR_BASED = CfgNode(dict(ALPHA=1e-3, BETA=5e-4, GAMMA=5e-4, LAMBDA=5e-6, TEMPERATURE=0.5))
        node.ANCHOR_FREE = CfgNode(dict(ALPHA=1.6e-3, BETA=8e-4, GAMMA=8e-4, LAMBDA=8e-6, TEMPERATURE=0.8))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.config = cfg.DISTILL.FGD[student_spec.family]
        if self.config.TEMPERATURE <= 0:
            raise GDetKDError(
                f"DISTILL.FGD.{student_spec.family}.TEMPERATURE must be positive, not {self.config.TEMPERATURE}."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)
        self.students = nn.ModuleList(GlobalContext(teacher_spec.channels) for _ in self.levels)
        self.teachers = nn.ModuleList(GlobalContext(teacher_spec.channels) for _ in self.levels)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        boxes = [each.tensor for each in student.gt_boxes]
        total = 0.0
        for place, (level, (ours, its)) in enumerate(zip(self.levels, self.maps(student, teacher))):
            adapted = self.adapters[place](ours)
            total = total + self._focal(adapted, its, scale_masks(boxes, level.stride, its.shape[-2:]))
            relation = (self.students[place](adapted) - self.teachers[place](its)) ** 2
            total = total + self.config.LAMBDA * relation.sum() / len(its)
        return total

    def _focal(self, student: torch.Tensor, teacher: torch.Tensor, masks: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        ours, its = (attention(maps, self.config.TEMPERATURE) for maps in (student, teacher))
        foreground, background = (focal_imitation(student, teacher, mask, its) for mask in masks)
        focal = self.config.ALPHA * foreground + self.config.BETA * background
        return focal + self.config.GAMMA * attention_imitation(ours, its)
