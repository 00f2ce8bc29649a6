"""The further negatives of CKD: teacher embeddings of other processes and of past steps.

Shapes: N embeddings, D the width of an embedding.
"""

import logging
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)


def gather_embeddings(embeddings: torch.Tensor) -> Tuple[int, List[torch.Tensor]]:
    """Collect the embeddings (N, D) of all processes, without gradient. N may differ between processes, and may be 0.

    Returns:
        this process's rank, and a list of the embeddings by rank.
    """
    embeddings = embeddings.detach()
    if comm.get_world_size() == 1:
        return 0, [embeddings]
    count = torch.full((1,), len(embeddings), dtype=torch.long, device=embeddings.device)
    counts = [torch.empty_like(count) for _ in range(comm.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = embeddings.new_zeros(max(sizes), embeddings.shape[1])
    padded[: len(embeddings)] = embeddings
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return comm.get_rank(), [part[:size] for part, size in zip(gathered, sizes)]


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
