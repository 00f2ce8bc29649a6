"""Contrastive distillation, CKD (Yao et al., "G-DetKD", ICCV 2021, https://arxiv.org/abs/2108.07482).

Shapes: N regions, K further negatives (the queue and other processes), D the width of an embedding.
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


def gather_embeddings(embeddings: torch.Tensor) -> Tuple[int, List[torch.Tensor]]:
    """Collect the embeddings (N, D) of all processes, without gradient. N may differ between processes, and may be 0.

    Returns:
        this process's rank, and a list of the embeddings by rank.
    """
    embeddings = embeddings.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0, [embeddings]
    count = torch.full((1,), len(embeddings), dtype=torch.long, device=embeddings.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = embeddings.new_zeros(max(sizes), embeddings.shape[1])
    padded[: len(embeddings)] = embeddings
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return dist.get_rank(), [part[:size] for part, size in zip(gathered, sizes)]


class EmbeddingQueue(nn.Module):
    """Keep the last `size` teacher embeddings. New embeddings overwrite the oldest.

    The queue holds embeddings before the projection: the teacher is frozen, so they stay valid, but the projection is
    learned. Pushed embeddings become visible at the next `contents`, because the backward pass still reads the queue.
    An embedding that is not finite is dropped, and the old embedding in its place stays.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))
        # The same two numbers for Python. Reading the buffers would make the CPU wait for the GPU at every step.
        self._filled, self._next = 0, 0
        self._pending: Optional[torch.Tensor] = None

    def push(self, embeddings: torch.Tensor) -> None:
        """Store embeddings (N, D), the newest last. They wait until the queue is read."""
        self._pending = embeddings

    def contents(self) -> torch.Tensor:
        """Return the stored embeddings (filled, D). The result is a view, valid until the next call."""
        self._write_pending()
        return self.embeddings[: self._filled]

    def settle(self) -> None:
        """Write the pending embeddings before a step. Then `drop_pending` drops those of the step alone."""
        self._write_pending()

    def drop_pending(self) -> None:
        """Forget the embeddings of a step that is undone."""
        self._pending = None

    def _write_pending(self) -> None:
        new, self._pending = self._pending, None
        size = len(self.embeddings)
        if new is None or size == 0:
            return
        new = new[-size:]
        places = torch.arange(self._next, self._next + len(new), device=new.device) % size
        # `where` needs no row count. Indexing by a mask would make the GPU wait for the number of rows.
        is_finite = torch.isfinite(new).all(dim=1, keepdim=True)  # (N, 1)
        self.embeddings[places] = torch.where(is_finite, new.to(self.embeddings.dtype), self.embeddings[places])
        self._next = (self._next + len(new)) % size
        self._filled = min(self._filled + len(new), size)
        self.next.fill_(self._next)
        self.filled.fill_(self._filled)

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._write_pending()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
        self._pending = None
        saved = state_dict.get(f"{prefix}embeddings")
        if saved is not None and len(saved) != len(self.embeddings):
            state_dict = {**state_dict, **self._fitted(state_dict, prefix)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._filled, self._next = int(self.filled), int(self.next)

    def _fitted(self, state_dict: Dict[str, Any], prefix: str) -> Dict[str, torch.Tensor]:
        """Return the state of a saved queue of another length, fitted to this one. The newest embeddings are kept.

        The length follows from the batch size (DISTILL.CKD.QUEUE_STEPS), which can change when a run is resumed.
        """
        saved, filled, start = (state_dict[prefix + name] for name in ("embeddings", "filled", "next"))
        # Oldest first. Until the queue is full, `next` is the number of embeddings.
        in_order = saved[: int(filled)].roll(-int(start), dims=0)
        size = len(self.embeddings)
        newest = in_order[max(0, len(in_order) - size) :]
        logger.info(
            "CKD's queue: the checkpoint has %d embeddings (length %d). This run keeps the newest %d (length %d).",
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
