"""End a program with a message that helps: alone for a known mistake, below the traceback for any other error."""

import errno
import re
import sys
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional

import torch

from .errors import GDetKDError

REPORT = (
    "GDetKD did not expect this error. If the lines above do not show its cause, please report it as an issue of "
    "GDetKD, with these lines and the log.txt of OUTPUT_DIR."
)
# Errors of the system whose text says all that a user needs.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# How a traceback begins its last part, if that is one of GDetKD's errors.
KNOWN = re.compile(r"^gdetkd\.\w+(\.\w+)*Error: ", re.MULTILINE)


@contextmanager
def explained_errors() -> Iterator[None]:
    """Exit with status 1 and a message if the code inside fails.

    Raises:
        SystemExit: the code inside raised an error, or was interrupted by Ctrl-C (status 130).
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        message = known_message(e)
        if message is None:
            traceback.print_exc()
        sys.exit(message or REPORT)


def known_message(error: BaseException) -> Optional[str]:
    """Return what to tell a user instead of a traceback, or None if the error is not of a known kind."""
    if isinstance(error, GDetKDError):
        return str(error)
    if isinstance(error, getattr(torch.cuda, "OutOfMemoryError", ())):
        return (
            f"The memory of the GPU is full ({str(error).splitlines()[0]}). Lower SOLVER.IMS_PER_BATCH or "
            "INPUT.MIN_SIZE_TRAIN, or set DISTILL.TEACHER.DTYPE to float16. --check prints the memory of a step."
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{error.strerror}: {error.filename or 'a file of this run'}. Choose an OUTPUT_DIR with room and access."
    return None


def message_in(traceback_text: str) -> Optional[str]:
    """Return the message of the GDetKDError that a traceback of another process ends with, or None."""
    found = list(KNOWN.finditer(traceback_text))
    return traceback_text[found[-1].end() :].strip() if found else None
