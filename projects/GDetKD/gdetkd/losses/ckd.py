"""Contrastive distillation, CKD (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482).

Shapes: N regions, K further negatives (the queue and other processes), D the width of an embedding.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torchvision.ops import box_iou

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, sum_of_zeros
from .embedding_queue import EmbeddingQueue, gather_embeddings


def contrastive_distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    boxes: torch.Tensor,
    image_ids: torch.Tensor,
    queue: Optional[torch.Tensor] = None,
    gamma: float = 0.07,
    iou_threshold: float = 0.5,
) -> torch.Tensor:
    """Pull a region's student embedding towards its teacher embedding, and push it away from negatives (InfoNCE).

    The negatives of a region are the teacher embeddings of the other regions and of the queue. A region of the same
    image that overlaps it by more than `iou_threshold` is left out, because it shows the same object. For example, two
    regions at the same place are negatives of each other in two images, but not in one image:

        >>> embeddings = torch.eye(2)  # student and teacher agree on both regions
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
        >>> contrastive_distillation(embeddings, embeddings, boxes, torch.tensor([0, 1]), gamma=1.0)
        tensor(0.3133)
        >>> contrastive_distillation(embeddings, embeddings, boxes, torch.tensor([0, 0]), gamma=1.0)
        tensor(0.)

    Args:
        student: (N, D) projected embeddings. They are normalised here.
        teacher: (N, D) projected embeddings of the same regions.
        boxes: (N, 4) xyxy in pixels.
        image_ids: (N,) index of each region's image.
        queue: (K, D) further negatives, or None.
        gamma: temperature of the cosine similarities.
        iou_threshold: IoU above which regions of one image are not negatives of each other.

    Returns:
        mean over N of -log( g(s_i, t_i) / (g(s_i, t_i) + sum over negatives g(s_i, t_j)) ), g = exp(cos / gamma);
        0 for N = 0. The positive is in the denominator, so the loss is never negative.
    """
    count = len(student)
    if count == 0:
        return sum_of_zeros([student, teacher] + ([] if queue is None else [queue]))
    candidates = teacher if queue is None else torch.cat([teacher, queue])
    left_out = (image_ids[:, None] == image_ids) & (box_iou(boxes, boxes) > iou_threshold)
    left_out.fill_diagonal_(False)  # a region overlaps itself, but is its own positive
    # Dividing the student's side by gamma is cheaper: it has N rows, and the candidates N + K.
    return _InfoNCE.apply(F.normalize(student, dim=1) / gamma, F.normalize(candidates, dim=1), left_out)


class _InfoNCE(Function):
    """Compute the cross-entropy of each anchor's similarities with all candidates. Candidate i is anchor i's target.

    (N, N + K) is the largest tensor of a step: 268 MB for 1,024 regions and 65,536 negatives. Autograd would hold it
    several times. This function makes it once, and turns it into the probabilities in place.
    """

    @staticmethod
    def forward(ctx: Any, anchors: torch.Tensor, candidates: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, a scalar.

        Args:
            anchors: (N, D)
            candidates: (N + K, D)
            left_out: (N, N) bool, true where candidate j is no negative of anchor i.
        """
        similarity = anchors @ candidates.t()  # (N, N + K)
        similarity[:, : len(anchors)].masked_fill_(left_out, float("-inf"))
        largest = similarity.amax(dim=1, keepdim=True)
        positive = similarity.diagonal() - largest[:, 0]
        probability = similarity.sub_(largest).exp_()
        total = probability.sum(dim=1, keepdim=True)
        ctx.save_for_backward(anchors, candidates, probability.div_(total))
        return (total.log()[:, 0] - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        anchors, candidates, probability = ctx.saved_tensors
        count = len(anchors)
        grad_anchors = probability @ candidates - candidates[:count]
        grad_candidates = probability.t() @ anchors
        grad_candidates[:count] -= anchors
        return grad_anchors * (gradient / count), grad_candidates.mul_(gradient / count), None


def queue_length(cfg: CfgNode, student_spec: DetectorSpec) -> int:
    """Return the length of the queue: DISTILL.CKD.QUEUE_SIZE, or the number of embeddings of QUEUE_STEPS steps.

    Raises:
        GDetKDError: a key is negative, or the student's number of regions is unknown.
    """
    config = cfg.DISTILL.CKD
    if config.QUEUE_SIZE < -1:
        raise GDetKDError(
            f"DISTILL.CKD.QUEUE_SIZE is {config.QUEUE_SIZE}. Set it to the number of embeddings that the queue holds, "
            "0 for no queue, or -1 to derive it from DISTILL.CKD.QUEUE_STEPS."
        )
    if config.QUEUE_STEPS < 0:
        raise GDetKDError(
            f"DISTILL.CKD.QUEUE_STEPS is {config.QUEUE_STEPS}. Set it to the number of steps that the queue holds, or "
            "to 0 for no queue."
        )
    if config.QUEUE_SIZE >= 0:
        return config.QUEUE_SIZE
    if student_spec.regions_per_image is None:
        raise GDetKDError(
            "CKD cannot derive the length of its queue from DISTILL.CKD.QUEUE_STEPS, because the student's adapter "
            "does not say how many regions an image has. Set `regions_per_image` in the adapter's DetectorSpec, or set "
            "DISTILL.CKD.QUEUE_SIZE."
        )
    return config.QUEUE_STEPS * cfg.SOLVER.IMS_PER_BATCH * student_spec.regions_per_image


@DISTILL_LOSS_REGISTRY.register()
class CKD(DistillLoss):
    """Compare region embeddings by `contrastive_distillation`.

    The module has a linear adapter to the teacher's width, the projection f of both detectors, and the queue.

    Raises:
        GDetKDError: the temperature is not positive, or the length of the queue is invalid or unknown.
    """

    default_weight = 0.5  # source: a re-implementation
    needs = frozenset({"embeddings"})
    reads_regions_alone = True

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Temperature of the cosine similarities, positive. Source: a re-implementation.
        node.GAMMA = 0.07
        # Regions of one image that overlap by more than this IoU are not negatives of each other. Source of the value:
        # re-implementations. A write-up says that IoU filters the negatives, but gives no value.
        node.IOU_THRESHOLD = 0.5
        # Width of the shared projection f, a linear layer with a bias. Source: our choice. A re-implementation uses a
        # width of 1024 and no bias.
        node.PROJECTION_DIM = 128
        # Number of past steps whose teacher embeddings, from all processes, are kept as negatives. 0: no queue.
        # The length of the queue is QUEUE_STEPS x SOLVER.IMS_PER_BATCH x regions of an image. The regions of an image
        # are MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE for a two-stage student, and DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE for
        # a dense student. For example, 10 steps of 16 images with 512 regions are 81,920 embeddings. They take 336 MB
        # if an embedding has 1,024 numbers. The paper gives no length. The only public configuration keeps ten steps
        # and counts the current step. GDetKD does not count the current step.
        node.QUEUE_STEPS = 10
        # Length of the queue in embeddings. It overrides QUEUE_STEPS. 0: no queue. -1: derive it from QUEUE_STEPS.
        node.QUEUE_SIZE = -1

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        config = cfg.DISTILL.CKD
        if config.GAMMA <= 0:
            raise GDetKDError(f"DISTILL.CKD.GAMMA is {config.GAMMA}. A temperature must be positive, for example 0.07.")
        self.gamma = config.GAMMA
        self.iou_threshold = config.IOU_THRESHOLD
        self.adapter = nn.Linear(student_spec.embedding_dim, teacher_spec.embedding_dim)
        self.projection = nn.Linear(teacher_spec.embedding_dim, config.PROJECTION_DIM)
        self.queue = EmbeddingQueue(queue_length(cfg, student_spec), teacher_spec.embedding_dim)

    def join_exchange(self) -> None:
        gather_embeddings(self.adapter.weight.new_zeros(0, self.projection.in_features))

    def before_step(self) -> None:
        self.queue.settle()

    def undo_step(self) -> None:
        self.queue.drop_pending()

    def fill(self) -> None:
        self.queue.push(torch.randn_like(self.queue.embeddings))
        self.queue.settle()

    def compute(self, student: DetectorOutputs, teacher: DetectorOutputs) -> torch.Tensor:
        raw = full_precision(teacher.embeddings)  # (N, D_T)
        rank, by_rank = gather_embeddings(raw)
        # Each part is projected alone. Joining the parts first would copy the whole queue.
        negatives = [*by_rank[:rank], *by_rank[rank + 1 :], self.queue.contents()]
        loss = contrastive_distillation(
            self.projection(self.adapter(full_precision(student.embeddings))),
            self.projection(raw),
            student.regions.tensor(),
            student.regions.image_ids(),
            torch.cat([self.projection(part) for part in negatives]),
            self.gamma,
            self.iou_threshold,
        )
        self.queue.push(torch.cat(by_rank))
        return loss
