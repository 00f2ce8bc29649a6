"""Looks at every step before the optimizer's: are the losses finite, and is the run asked to stop, on any process."""

import json
import logging
import math
import os
import signal
import threading
from typing import Any, Dict, List, Tuple

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from ..errors import GDetKDError
from ..losses.ckd import EmbeddingQueue
from .checkpoint import written_whole
from .hooks import RandomState, get_random_state
from .schedule import LossSchedule

logger = logging.getLogger(__name__)

# Exit code of a run that SIGTERM ended after it saved: sysexits.h's "try again", here with --resume.
EXIT_STOPPED = 75


class NonFiniteError(GDetKDError):
    """A loss is infinite or not a number."""


class StepSkipped(Exception):
    """Ends a step before the optimizer's."""


class StepGuard(HookBase):
    """Stops a run whose losses are not finite before that reaches a parameter, and notes that one gets SIGTERM, for
    `AgreedStop`. Every process comes to the same decision.

    It must be the last hook: until the run has ended, the evaluation after the last step included, SIGTERM is noted.

    Args:
        tolerated: steps that may be skipped, over the whole run, for a loss that is not finite.
        random_state: the hook that keeps the random states for the checkpoint.
    """

    def __init__(self, tolerated: int, random_state: RandomState) -> None:
        self._tolerated = tolerated
        self._random_state = random_state
        self._skipped = 0
        self._is_asked = False  # this process, to stop
        self.stop_is_agreed = False  # of all processes, for SIGTERM to one of them
        self._files: List[str] = []
        self._statistics: List[Tuple[torch.Tensor, torch.Tensor]] = []
        self._queues: List[EmbeddingQueue] = []
        self._random_before: Dict[str, Any] = {}
        self._handler: Any = None

    def attach(self, model: nn.Module) -> Any:
        """Notes the file names of each batch that `model` gets in training. Returns the handle that undoes this."""
        return model.register_forward_pre_hook(self._note_batch)

    def _note_batch(self, model: nn.Module, inputs: Tuple[Any, ...]) -> None:
        if model.training:
            self._files = [str(sample.get("file_name", "no file name")) for sample in inputs[0]]

    def before_train(self) -> None:
        # The forward pass writes to these before the losses are known.
        self._queues = [module for module in self.trainer.model.modules() if isinstance(module, EmbeddingQueue)]
        buffers = [b for m in self.trainer.model.modules() if _has_statistics(m) for b in m.buffers(recurse=False)]
        self._statistics = [(buffer, torch.empty_like(buffer)) for buffer in buffers]
        if threading.current_thread() is threading.main_thread():  # Python allows no other to handle signals
            self._handler = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _ask(self, number: int, frame: Any) -> None:
        self._is_asked = True

    def before_step(self) -> None:
        for buffer, before in self._statistics:
            before.copy_(buffer)
        for queue in self._queues:
            queue.settle()
        self._random_before = get_random_state()

    def check(self, losses: Dict[str, torch.Tensor]) -> None:
        """Called between the backward pass and the optimizer's step, when Detectron2 fetches the losses anyway.

        Raises:
            StepSkipped: a loss of some process is not finite, and that is tolerated.
            NonFiniteError: it is not.
        """
        values = dict(zip(losses, torch.stack([loss.detach().float().sum() for loss in losses.values()]).tolist()))
        terms = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        some_not_finite, self.stop_is_agreed = _on_any_process(bool(terms), self._is_asked)
        if some_not_finite:
            self._skip_or_stop(comm.all_gather({"terms": terms, "files": self._files}))

    def no_losses(self, error: FloatingPointError) -> None:
        """Called where the student's forward pass itself finds values that are not finite.

        The other processes do not know of it and wait in the backward pass, so that with several it ends the run.

        Raises:
            NonFiniteError, StepSkipped: as `check`.
        """
        found = {"terms": {"the student's proposals": str(error)}, "files": self._files}
        if comm.get_world_size() > 1:
            raise NonFiniteError(self._message([found]) + " It cannot be skipped with several processes.") from error
        self._skip_or_stop([found])

    def _skip_or_stop(self, found: List[Dict[str, Any]]) -> None:
        for buffer, before in self._statistics:
            buffer.copy_(before)
        for queue in self._queues:
            queue.drop_pending()
        message = self._message(found)
        if self._skipped < self._tolerated:
            self._skipped += 1
            logger.warning(
                "%s The step is left out: %d of the %d that DISTILL.SKIP_NONFINITE tolerates.",
                *(message, self._skipped, self._tolerated),
            )
            raise StepSkipped
        name = f"nonfinite_{self.trainer.iter:07d}"
        self._random_state.keep(self._random_before)
        if comm.is_main_process():
            self._write_report(name, found)
            self._save_before_step(name)
        comm.synchronize()  # or the error of another would make the launcher end the one that writes
        raise NonFiniteError(
            f"{message} The optimizer did not take that step. The batch's files are in {name}.json and the state "
            f"before the step in {name}.pth, in {self.trainer.cfg.OUTPUT_DIR}. Look at these images and at the weight "
            "of that term, let DISTILL.SKIP_NONFINITE leave such steps out, or start anew with a lower "
            "SOLVER.BASE_LR: a run that is resumed keeps its own."
        )

    def _save_before_step(self, name: str) -> None:
        """A checkpoint's iteration is the last that was done, and resuming takes the one after: this one, again."""
        self.trainer.iter -= 1
        try:
            self.trainer.checkpointer.save_aside(name, iteration=self.trainer.iter)
        finally:
            self.trainer.iter += 1

    def _write_report(self, name: str, found: List[Dict[str, Any]]) -> None:
        report = json.dumps({"iteration": self.trainer.iter, "processes": found}, indent=2)
        try:
            with written_whole(os.path.join(self.trainer.cfg.OUTPUT_DIR, f"{name}.json")) as file:
                file.write(report)
        except OSError as e:
            logger.error("%s.json could not be written (%s); it would say: %s", name, e.strerror or e, report)

    def _message(self, found: List[Dict[str, Any]]) -> str:
        of_ranks = {rank: of_rank for rank, of_rank in enumerate(found) if of_rank["terms"]}
        parts = [f"{name} is {value}" for of_rank in of_ranks.values() for name, value in of_rank["terms"].items()]
        files = [name for of_rank in of_ranks.values() for name in of_rank["files"]]
        return (
            f"At iteration {self.trainer.iter} {'; '.join(dict.fromkeys(parts))} (process "
            f"{', '.join(map(str, of_ranks))}; images {', '.join(files)})."
        )

    def state_dict(self) -> Dict[str, Any]:
        return {"skipped": self._skipped} if self._skipped else {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._skipped = state["skipped"]


class AgreedStop(HookBase):
    """Saves and ends a run that is to stop, when its step is done.

    It must stand after the hooks whose work is part of a step (the schedule's, the periodic checkpoint) and before the
    one that evaluates: a cluster that sends SIGTERM may wait for less than an evaluation takes. `MissedEvaluation`
    makes up for it on resume.
    """

    def __init__(self, guard: StepGuard, random_state: RandomState) -> None:
        self._guard = guard
        self._random_state = random_state

    def after_step(self) -> None:
        """
        Raises:
            SystemExit: with EXIT_STOPPED, the run is saved and can go on.
            GDetKDError: the run ends and could not be saved.
        """
        iteration = self.trainer.iter
        if not self._guard.stop_is_agreed or iteration + 1 >= self.trainer.max_iter:
            return
        self._random_state.keep()
        # Exchanged also because one that ends would make the launcher end the one that writes.
        is_saved, last = comm.all_gather(self._save(iteration) if comm.is_main_process() else None)[0]
        if not is_saved:
            raise GDetKDError(
                f"SIGTERM: the run stops after iteration {iteration} and could NOT be saved. Make room in "
                f"{self.trainer.cfg.OUTPUT_DIR}; --resume goes on from {last or 'nothing'}, and takes the iterations "
                "since then again."
            )
        logger.warning(
            "SIGTERM: the run stops after iteration %d, with exit code %d. --resume goes on with it.",
            *(iteration, EXIT_STOPPED),
        )
        raise SystemExit(EXIT_STOPPED)

    def _save(self, iteration: int) -> Tuple[bool, str]:
        """Whether the run is saved, and the name of the file that it would be resumed from."""
        checkpointer, name = self.trainer.checkpointer, f"model_{iteration:07d}"
        before = len(checkpointer.failed)
        checkpointer.save(name, iteration=iteration)
        return len(checkpointer.failed) == before, os.path.basename(checkpointer.get_checkpoint_file())


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats


def _on_any_process(*flags: bool) -> List[bool]:
    """Each flag, raised where any process raises it."""
    if comm.get_world_size() == 1:
        return list(flags)
    together = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return together.bool().tolist()


class _Guarded:
    """Detectron2's step, looked at by a `StepGuard` before the optimizer's part; and the terms' values are logged."""

    guard: StepGuard
    schedule: LossSchedule

    def run_step(self) -> None:
        try:
            try:
                super().run_step()
            except FloatingPointError as e:  # Detectron2's, of a proposal generator
                self.guard.no_losses(e)
        except StepSkipped:
            self.optimizer.zero_grad()

    def _write_metrics(self, loss_dict: Dict[str, torch.Tensor], data_time: float, *args: Any, **kwargs: Any) -> None:
        self.guard.check(loss_dict)
        self.schedule.log()
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)


class GuardedTrainer(_Guarded, SimpleTrainer):
    pass


class GuardedAMPTrainer(_Guarded, AMPTrainer):
    pass
