"""Let a loader's workers outlive the SIGTERM by which a cluster warns all processes.

Without its workers, a training could not finish its step and save.
"""

import os
import signal
import threading
from contextlib import contextmanager
from typing import Any, Iterator

from torch.utils.data import DataLoader

# macOS and Windows have no `sigwaitinfo`. There, workers end at any SIGTERM.
_CAN_WAIT = hasattr(signal, "sigwaitinfo")


class OutlivingLoader:
    """Iterate over a loader whose workers ignore SIGTERM, unless the process that started them sends it.

    torch ends workers by SIGTERM, too.
    """

    def __init__(self, loader: DataLoader) -> None:
        loader.worker_init_fn = _end_only_by_parent
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        with _sigterm_blocked():
            return iter(self._loader)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM, so that all threads of a process that is forked meanwhile have it blocked.

    A worker forks with torch's pool of threads. One thread that does not block SIGTERM would take it from
    `sigwaitinfo`, and the worker would then never end.
    """
    if not _CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_only_by_parent(worker: int) -> None:
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
