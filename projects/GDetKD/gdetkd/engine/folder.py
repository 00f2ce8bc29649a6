"""OUTPUT_DIR belongs to one training at a time."""

import fcntl
import logging
import os
from contextlib import contextmanager
from typing import IO, Iterator, Tuple

from detectron2.utils import comm

from ..errors import GDetKDError

logger = logging.getLogger(__name__)

LOCK = ".training"


@contextmanager
def only_training_in(folder: str) -> Iterator[None]:
    """Holds the folder inside, until this process ends at the latest, however it does. Every process has to enter.

    Raises:
        GDetKDError: on every process, another training writes there.
    """
    lock, error = _lock(folder) if comm.is_main_process() else (None, "")
    if error := comm.all_gather(error)[0]:
        raise GDetKDError(error)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _lock(folder: str) -> Tuple[IO[str], str]:
    """An open file that is locked, and what is wrong."""
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, LOCK), "w")
    try:
        # Not flock: the workers that load data would inherit it, and outlive a process that is killed.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        return lock, (
            f"Another training is writing to {folder!r}: wait until it has ended, end it, or choose another OUTPUT_DIR."
        )
    except OSError as e:  # of file systems that know no locks
        logger.warning("Whether another training writes to %s cannot be seen there (%s).", folder, e.strerror or e)
    return lock, ""
