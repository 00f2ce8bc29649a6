"""Write files that are whole or not there."""

import errno
import os
from contextlib import contextmanager
from typing import Any, Iterator, Optional

# Ending of a file that is still being written. A kill leaves one behind, which the next --resume removes.
PARTIAL = ".partial"


class _Watched:
    """A file for writing that remembers the error that writing raised: torch raises one of its own instead."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as e:
            self.error = e
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def written_whole(path: str, mode: str = "w") -> Iterator[Any]:
    """Open a file to write to, which appears under its name only when all of it is on the disk.

    Raises:
        OSError: it cannot be written, for want of space say; what was at `path` is still there, and nothing else.
    """
    partial = path + PARTIAL
    try:
        with open(partial, mode) as file:
            watched = _Watched(file)
            try:
                yield watched
            except RuntimeError as e:
                if watched.error is None:
                    raise
                raise watched.error from e
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
    _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(folder: str) -> None:
    """A renaming is on the disk only when its folder is. Some network file systems do not know how to, and say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
