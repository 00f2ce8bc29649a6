"""Contrastive distillation (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482).

Shapes: N regions of this process, M of other processes, K in the queue, D the width of what is compared.
"""

import logging
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torchvision.ops import box_iou

from ..errors import GDetKDError
from ..structures import DetectorOutputs, DetectorSpec, full_precision
from .build import DISTILL_LOSS_REGISTRY, DistillLoss, sum_of_zeros

logger = logging.getLogger(__name__)


def contrastive_distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    boxes: torch.Tensor,
    image_ids: torch.Tensor,
    queue: Optional[torch.Tensor] = None,
    gamma: float = 0.07,
    iou_threshold: float = 0.5,
) -> torch.Tensor:
    """InfoNCE between each region's student and teacher embedding.

    Negatives of a region are the teacher embeddings of all other regions and of the queue, but for regions of the
    same image that overlap it by more than `iou_threshold`. The positive stays in the denominator, so the loss
    is never negative.

    Args:
        student: (N, D) projected embeddings, of any length.
        teacher: (N, D) the same regions'.
        boxes: (N, 4) xyxy in pixels.
        image_ids: (N,) the image that each region is of.
        queue: (K, D) further negatives, or None.
        gamma: temperature of the cosine similarities.
        iou_threshold: in IoU.

    Returns:
        mean over N of -log( g(s_i, t_i) / (g(s_i, t_i) + sum over negatives g(s_i, t_j)) ), g = exp(cos / gamma);
        0 for N = 0.
    """
    count = len(student)
    if count == 0:
        return sum_of_zeros([student, teacher] + ([] if queue is None else [queue]))
    candidates = teacher if queue is None else torch.cat([teacher, queue])
    left_out = (image_ids[:, None] == image_ids) & (box_iou(boxes, boxes) > iou_threshold)
    left_out.fill_diagonal_(False)  # a region is its own positive, though it overlaps itself
    # gamma divides the smaller side.
    return _InfoNCE.apply(F.normalize(student, dim=1) / gamma, F.normalize(candidates, dim=1), left_out)


class _InfoNCE(Function):
    """Cross-entropy of each anchor's similarities with all candidates, the candidate of its own row being the target.

    (N, N + K) is the largest tensor of a step: 268 MB for 1,024 regions and 65,536 negatives. Autograd would hold it
    several times; here it is made once, becomes the probabilities in place, and the backward pass makes no other.
    """

    @staticmethod
    def forward(ctx: Any, anchors: torch.Tensor, candidates: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
        """(N, D), (N + K, D) and (N, N), of the first N candidates those that are no negatives -> scalar"""
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


def gather_embeddings(embeddings: torch.Tensor) -> Tuple[int, List[torch.Tensor]]:
    """Collects (N_rank, D) of all processes; N may differ, and be 0. No gradient flows.

    Returns:
        this process's rank, and the embeddings of each rank.
    """
    embeddings = embeddings.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0, [embeddings]
    counts = [torch.zeros(1, dtype=torch.long, device=embeddings.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(embeddings)], device=embeddings.device))
    sizes = [int(count) for count in counts]
    padded = embeddings.new_zeros(max(sizes), embeddings.shape[1])
    padded[: len(embeddings)] = embeddings
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return dist.get_rank(), [part[:size] for part, size in zip(gathered, sizes)]


class EmbeddingQueue(nn.Module):
    """The last `size` raw teacher embeddings, oldest overwritten first.

    They are raw because a frozen teacher's never go stale, while their projection is learned. What is pushed becomes
    visible at the next `contents`, that is after the backward pass, which still reads the queue. One that is not finite
    never does: what was in its place stays.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))
        self._pending: Optional[torch.Tensor] = None

    def push(self, embeddings: torch.Tensor) -> None:
        """(N, D), the newest last."""
        self._pending = embeddings

    def contents(self) -> torch.Tensor:
        """(filled, D); a view, valid until the next call."""
        self._write_pending()
        return self.embeddings[: int(self.filled)]

    def settle(self) -> None:
        """Makes visible what was pushed, before a step; so that what waits during the step is the step's own."""
        self._write_pending()

    def drop_pending(self) -> None:
        """Forgets what was pushed since, of a step that is undone."""
        self._pending = None

    def _write_pending(self) -> None:
        new, self._pending = self._pending, None
        size = len(self.embeddings)
        if new is None or size == 0:
            return
        new = new[-size:]
        places = (torch.arange(len(new), device=new.device) + self.next) % size
        # Chosen by value, for leaving rows out would make a GPU wait for their number.
        is_finite = torch.isfinite(new).all(dim=1, keepdim=True)  # (N, 1)
        self.embeddings[places] = torch.where(is_finite, new.to(self.embeddings.dtype), self.embeddings[places])
        self.next.copy_((self.next + len(new)) % size)
        self.filled.copy_((self.filled + len(new)).clamp(max=size))

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._write_pending()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        self._pending = None
        saved = state_dict.get(f"{prefix}embeddings")
        if saved is not None and len(saved) != len(self.embeddings):
            state_dict = {**state_dict, **self._fitted(state_dict, prefix)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fitted(self, state_dict: Dict[str, Any], prefix: str) -> Dict[str, torch.Tensor]:
        """Return the newest embeddings of a queue of another length: on other GPUs a resumed run may gather other
        numbers, and has another length from DISTILL.CKD.QUEUE_STEPS."""
        saved, filled, start = (state_dict[prefix + name] for name in ("embeddings", "filled", "next"))
        # Oldest first. Until the queue is full, `next` is the number of embeddings.
        in_order = saved[: int(filled)].roll(-int(start), dims=0)
        size = len(self.embeddings)
        newest = in_order[max(0, len(in_order) - size) :]
        logger.info(
            "CKD's queue: the checkpoint has %d embeddings (length %d); this run keeps the newest %d (length %d).",
            filled,
            len(saved),
            len(newest),
            size,
        )
        embeddings = saved.new_zeros(size, saved.shape[1])
        embeddings[: len(newest)] = newest
        count = torch.tensor(len(newest))
        fitted = {"embeddings": embeddings, "filled": count, "next": count}
        return {prefix + name: value for name, value in fitted.items()}


def queue_length(cfg: CfgNode, student_spec: DetectorSpec) -> int:
    """Return how many embeddings the queue holds: DISTILL.CKD.QUEUE_SIZE, or what QUEUE_STEPS steps gather.

    Raises:
        GDetKDError: a key is negative, or nothing says how many regions the student has.
    """
    config = cfg.DISTILL.CKD
    if config.QUEUE_SIZE < -1:
        raise GDetKDError(
            f"DISTILL.CKD.QUEUE_SIZE is {config.QUEUE_SIZE}. Give the number of embeddings that the queue holds, 0 for "
            "no queue, or -1 to derive it from DISTILL.CKD.QUEUE_STEPS."
        )
    if config.QUEUE_STEPS < 0:
        raise GDetKDError(
            f"DISTILL.CKD.QUEUE_STEPS is {config.QUEUE_STEPS}. Give the number of steps that the queue holds, 0 for no "
            "queue."
        )
    if config.QUEUE_SIZE >= 0:
        return config.QUEUE_SIZE
    if student_spec.regions_per_image is None:
        raise GDetKDError(
            "The length of the queue cannot be derived from DISTILL.CKD.QUEUE_STEPS: the student's adapter does not "
            "give the regions of an image. Set `regions_per_image` in its DetectorSpec, or DISTILL.CKD.QUEUE_SIZE."
        )
    return config.QUEUE_STEPS * cfg.SOLVER.IMS_PER_BATCH * student_spec.regions_per_image


@DISTILL_LOSS_REGISTRY.register()
class CKD(DistillLoss):
    """Own the linear adapter to the teacher's width, the projection f that both sides share, and the queue.

    Raises:
        GDetKDError: the length of the queue is wrong or not known.
    """

    default_weight = 0.5  # source: a re-implementation
    needs = frozenset({"embeddings"})

    @classmethod
    def add_keys(cls, node: CfgNode) -> None:
        # Temperature of the contrastive similarities (cosines). Source: a re-implementation.
        node.GAMMA = 0.07
        # Regions of one image that overlap by more than this IoU are not negatives of each other. Source of the value:
        # re-implementations. A write-up says that IoU filters the negatives, but not at which value.
        node.IOU_THRESHOLD = 0.5
        # Width of the shared projection f, a linear layer with a bias. Source: ours. A re-implementation has a width of
        # 1024 and no bias.
        node.PROJECTION_DIM = 128
        # Past steps whose teacher embeddings are kept as negatives, those of all processes; 0: none. The queue then
        # holds QUEUE_STEPS x SOLVER.IMS_PER_BATCH x the regions of an image (MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE of a
        # two-stage student, DISTILL.REGIONS.BATCH_SIZE_PER_IMAGE of a dense one): 81,920 embeddings for 16 images of
        # 512 regions, or 336 MB if a teacher's embedding has 1,024 numbers. The length is unpublished. The only public
        # configuration keeps ten steps, the current one among them. Ours does not count the current step.
        node.QUEUE_STEPS = 10
        # The length of the queue in embeddings, whatever QUEUE_STEPS says; 0: no queue; -1: from QUEUE_STEPS.
        node.QUEUE_SIZE = -1

    def __init__(self, cfg: CfgNode, student_spec: DetectorSpec, teacher_spec: DetectorSpec) -> None:
        super().__init__()
        config = cfg.DISTILL.CKD
        self.gamma = config.GAMMA
        self.iou_threshold = config.IOU_THRESHOLD
        self.adapter = nn.Linear(student_spec.embedding_dim, teacher_spec.embedding_dim)
        # With a bias; the projection of the only public re-implementation has none.
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
        rank, everyone = gather_embeddings(raw)
        # Projected part by part: a copy of the whole queue beside the other processes' embeddings is as large as it.
        negatives = [*everyone[:rank], *everyone[rank + 1 :], self.queue.contents()]
        loss = contrastive_distillation(
            self.projection(self.adapter(full_precision(student.embeddings))),
            self.projection(raw),
            student.regions.tensor(),
            student.regions.image_ids(),
            torch.cat([self.projection(part) for part in negatives]),
            self.gamma,
            self.iou_threshold,
        )
        self.queue.push(torch.cat(everyone))
        return loss
