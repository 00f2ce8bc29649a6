"""Turn signals into SystemExit, so that a comparison ends the processes that it started."""

import signal
import sys
from contextlib import contextmanager
from typing import Any, Iterator, List

# Signals that arrived while a process was being started.
_waiting: List[int] = []
_is_starting = False


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP, so that the code inside can end the processes that it started."""
    # Under nohup SIGHUP is ignored, and stays ignored.
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def starting() -> Iterator[None]:
    """Let a signal of `exit_on_signals` wait until the code inside has started a process and kept its handle.

    Otherwise the signal could arrive between the two, and nobody would end that process.
    """
    global _is_starting
    _is_starting = True
    try:
        yield
    finally:
        _is_starting = False
    if _waiting:
        number = _waiting[0]
        _waiting.clear()
        sys.exit(128 + number)


def _end(number: int, frame: Any) -> None:
    if _is_starting:
        _waiting.append(number)
        return
    sys.exit(128 + number)
