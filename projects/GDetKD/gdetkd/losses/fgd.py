"""Focal and global distillation, FGD: Yang, Li, Jiang, Gong, Yuan, Zhao and Yuan, "Focal and Global Knowledge
Distillation for Detectors", CVPR 2022, https://arxiv.org/abs/2111.11837.

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
    """Hold the attention of a map to its cells and to its channels."""

    spatial: torch.Tensor  # (B, H, W), of mean 1 over H and W
    channel: torch.Tensor  # (B, C), of mean 1 over C


def attention(maps: torch.Tensor, temperature: float) -> Attention:
    """Measure in which cells and channels the absolute features (B, C, H, W) are large, by a softmax over each."""
    magnitude = maps.abs()
    spatial = torch.softmax(magnitude.mean(dim=1).flatten(1) / temperature, dim=1) * maps[0, 0].numel()
    channel = torch.softmax(magnitude.mean(dim=(2, 3)) / temperature, dim=1) * maps.shape[1]
    return Attention(spatial.view(len(maps), *maps.shape[-2:]), channel)


def scale_masks(gt_boxes: Sequence[torch.Tensor], stride: int, size: Sequence[int]) -> Tuple[torch.Tensor, ...]:
    """Return the masks of objects and of background. Weights in them make large and small objects count the same.

    A cell in an object has the weight 1 / (number of cells of that object). If objects overlap, the smallest object
    counts. A background cell has the weight 1 / (number of background cells of the image). For example, an object
    covers two of three cells:

        >>> objects, background = scale_masks([torch.tensor([[0.0, 0.0, 16.0, 8.0]])], stride=8, size=(1, 3))
        >>> objects, background
        (tensor([[[0.5000, 0.5000, 0.0000]]]), tensor([[[0., 0., 1.]]]))

    Args:
        gt_boxes: by image, (G, 4) xyxy in pixels; G may be 0.
        stride: pixels per cell.
        size: (H, W).

    Returns:
        two masks (B, H, W).
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
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, teacher_attention: Attention
) -> torch.Tensor:
    """Sum squared errors, weighted by a mask and the teacher's attention (a term of L_fea in the paper).

    Args:
        student, teacher: (B, C, H, W), the student adapted to the teacher's channels.
        mask: (B, H, W)
        teacher_attention: attention of the teacher's map.

    Returns:
        sum over C, H, W, mean over B.
    """
    weight = (mask * teacher_attention.spatial)[:, None] * teacher_attention.channel[:, :, None, None]
    return (weight * (student - teacher) ** 2).sum() / len(student)


def attention_imitation(student: Attention, teacher: Attention) -> torch.Tensor:
    """Sum the absolute differences of the two attentions over H, W and over C (L_at in the paper); mean over B."""
    spatial = (student.spatial - teacher.spatial).abs().sum()
    return (spatial + (student.channel - teacher.channel).abs().sum()) / len(student.channel)


class GlobalContext(nn.Module):
    """Add a context vector to every cell: features of all cells, pooled by attention (GcBlock, section 3.2).

    The block starts as the identity, as in the authors' code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.attend = nn.Conv2d(channels, 1, kernel_size=1)
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.attend.weight)
        for parameter in (self.attend.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(parameter)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the maps (B, C, H, W) with the context added."""
        weight = torch.softmax(self.attend(maps).flatten(1), dim=1)  # (B, H W)
        context = torch.einsum("bcx,bx->bc", maps.flatten(2), weight)
        return maps + self.expand(torch.relu(self.norm(self.reduce(context))))[:, :, None, None]


@DISTILL_LOSS_REGISTRY.register()
class FGD(MapLoss):
    """Sum four terms over the common levels (sections 3.1 and 3.2 of the paper).

    - alpha times `focal_imitation` of objects,
    - beta times `focal_imitation` of background,
    - gamma times `attention_imitation`,
    - lambda times the squared error of the maps after `GlobalContext`.

    The module has two `GlobalContext` for each level, one for the student and one for the teacher. It has a 1x1 adapter
    for each level if the widths of the pyramids differ.

    Raises:
        GDetKDError: the pyramids have no stride in common, or the temperature is not positive.
    """

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Values by the student's family. Source: the authors. ALPHA, BETA, GAMMA and LAMBDA are the factors on objects,
        # background, attention and global relation. TEMPERATURE is that of the attentions, positive.
        node.TWO_STAGE = CfgNode(dict(ALPHA=5e-5, BETA=2.5e-5, GAMMA=5e-5, LAMBDA=5e-7, TEMPERATURE=0.5))
        node.ANCHOR_BASED = CfgNode(dict(ALPHA=1e-3, BETA=5e-4, GAMMA=5e-4, LAMBDA=5e-6, TEMPERATURE=0.5))
        node.ANCHOR_FREE = CfgNode(dict(ALPHA=1.6e-3, BETA=8e-4, GAMMA=8e-4, LAMBDA=8e-6, TEMPERATURE=0.8))

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__(student_spec, teacher_spec)
        self.config = cfg.DISTILL.FGD[student_spec.family]
        if self.config.TEMPERATURE <= 0:
            raise GDetKDError(
                f"DISTILL.FGD.{student_spec.family}.TEMPERATURE is {self.config.TEMPERATURE}. Set it to a positive "
                "number."
            )
        self.adapters = adapters_where_widths_differ(self.levels, student_spec, teacher_spec)
        self.students = nn.ModuleList(GlobalContext(teacher_spec.channels) for _ in self.levels)
        self.teachers = nn.ModuleList(GlobalContext(teacher_spec.channels) for _ in self.levels)

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        gt_boxes = [boxes.tensor for boxes in student.gt_boxes]
        total = 0.0
        for index, (level, (student_map, teacher_map)) in enumerate(zip(self.levels, self.maps(student, teacher))):
            masks = scale_masks(gt_boxes, level.stride, teacher_map.shape[-2:])
            total = total + self._focal(student_map, teacher_map, masks)
            relation = (self.students[index](student_map) - self.teachers[index](teacher_map)) ** 2
            total = total + self.config.LAMBDA * relation.sum() / len(teacher_map)
        return total

    def _focal(self, student: torch.Tensor, teacher: torch.Tensor, masks: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        student_attention, teacher_attention = (attention(maps, self.config.TEMPERATURE) for maps in (student, teacher))
        foreground, background = (focal_imitation(student, teacher, mask, teacher_attention) for mask in masks)
        focal = self.config.ALPHA * foreground + self.config.BETA * background
        return focal + self.config.GAMMA * attention_imitation(student_attention, teacher_attention)
