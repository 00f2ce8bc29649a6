"""Reserve OUTPUT_DIR for one training at a time, and protect the checkpoints of an earlier training."""

import fcntl
import logging
import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator, List, Sequence, Tuple

from detectron2.utils import comm

from ..errors import GDetKDError, some

logger = logging.getLogger(__name__)

LOCK = ".training"
# Files that a new training does not replace at its start, and that a resume or a tool would take for its own.
OTHER_FILES = ("last_checkpoint", "insight/records.jsonl")


@contextmanager
def only_training_in(folder: str) -> Iterator[None]:
    """Reserve the folder inside, at the latest until this process ends in any way. All processes must enter together.

    Raises:
        GDetKDError: on every process, another training writes to the folder.
    """
    lock, error = _lock(folder) if comm.is_main_process() else (None, "")
    if error := comm.all_gather(error)[0]:
        raise GDetKDError(error)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def check_earlier_run(folder: str, resume: bool, overwrite: bool) -> None:
    """Refuse to start anew where a training has left checkpoints. All processes must call this together.

    Args:
        folder: OUTPUT_DIR.
        resume: the run continues the training in the folder.
        overwrite: the run may replace the training in the folder.

    Raises:
        GDetKDError: on every process, the folder holds checkpoints that the run would overwrite.
    """
    found = comm.all_gather(_checkpoints(folder) if comm.is_main_process() else [])[0]
    if found and not resume and not overwrite:
        raise GDetKDError(
            f"OUTPUT_DIR {folder!r} holds checkpoints of another training ({some(found, 3)}), which this run would "
            "overwrite. Continue it with --resume, choose another OUTPUT_DIR, or start anew with --overwrite."
        )


def remove_earlier_run(folder: str, needed: Sequence[str]) -> None:
    """Remove the checkpoints and records of an earlier training. All processes must call this together.

    If the new training ended before its first checkpoint, --resume would continue the earlier training. And Detectron2
    appends to metrics.json, so charts would show both trainings.

    Args:
        needed: files that the new training needs, also if it has to start again: starting weights, and the teacher's.

    Raises:
        GDetKDError: on every process, a needed file is among the files to remove. Then no file is removed.
    """
    found = _checkpoints(folder) if comm.is_main_process() else []
    lost = [path for path in needed if any(_is_same(path, os.path.join(folder, name)) for name in found)]
    if lost := comm.all_gather(lost)[0]:
        raise GDetKDError(
            f"--overwrite would remove {lost[0]!r}, whose weights the new training needs. Move this file out of "
            f"OUTPUT_DIR {folder!r}, or choose another OUTPUT_DIR."
        )
    if comm.is_main_process():
        with suppress(FileNotFoundError):
            os.truncate(os.path.join(folder, "metrics.json"), 0)  # the new training has opened it already
        for name in [*_checkpoints(folder), *OTHER_FILES]:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    comm.synchronize()


def warn_of_a_fresh_start(folder: str, has_checkpoint: bool) -> None:
    """Warn that --resume finds no checkpoint in the folder."""
    if not has_checkpoint:
        logger.warning("--resume: %r holds no checkpoint. THE TRAINING STARTS FROM THE BEGINNING.", folder)


def _is_same(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _checkpoints(folder: str) -> List[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.startswith("model_") and name.endswith(".pth"))


def _lock(folder: str) -> Tuple[IO[str], str]:
    """Return an open file that is locked, and an error message, empty if there is none."""
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, LOCK), "w")
    try:
        # The workers that load data would inherit an flock, and they outlive a process that is killed.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        return lock, (
            f"Another training is writing to {folder!r}. Wait until it has ended, end it, or choose another OUTPUT_DIR."
        )
    except OSError as e:  # some file systems have no locks
        logger.warning(
            "The file system of %s has no locks (%s). Make sure that no other training writes there.",
            folder,
            e.strerror or e,
        )
    return lock, ""
