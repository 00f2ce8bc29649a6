"""End a program with a helpful message. A known mistake shows the message alone, any other error the traceback too."""

import errno
import re
import sys
import traceback
from contextlib import contextmanager
from typing import Iterator, Optional

import torch

from .errors import GDetKDError, first_line

REPORT = (
    "GDetKD did not expect this error. If the lines above do not show the cause, please report an issue of GDetKD with "
    "these lines and the log.txt of OUTPUT_DIR."
)
# System errors that need no traceback: a full disk, or no permission to write.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# Start of the last part of a traceback that ends with an error of GDetKD.
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
    """Return the message that replaces the traceback of a known error, or None for any other error."""
    if isinstance(error, GDetKDError):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"The memory of the GPU is full ({first_line(error)}). Lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN, "
            "or set DISTILL.TEACHER.DTYPE to float16. --check prints the memory of a step."
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return (
            f"{error.strerror}: {error.filename or 'a file of this run'}. Choose an OUTPUT_DIR with free space and "
            "write access."
        )
    return None


def message_in(traceback_text: str) -> Optional[str]:
    """Return the message of the GDetKDError at the end of another process's traceback, or None."""
    found = list(KNOWN.finditer(traceback_text))
    return traceback_text[found[-1].end() :].strip() if found else None
