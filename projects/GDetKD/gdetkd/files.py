"""Write files completely or not at all, and read files that another process may be writing."""

import errno
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

logger = logging.getLogger(__name__)

# Ending of a file that is still being written. A killed run leaves such a file. The next --resume removes it.
PARTIAL = ".partial"


class _Watched:
    """Write to a file and remember the error of a write. torch hides that error behind a RuntimeError."""

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
    """Open a file for writing. The file appears at `path` only when it is complete on the disk.

    Raises:
        OSError: the file cannot be written, for example because the disk is full. An old file at `path` stays.
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
    """Write a folder to the disk, so that a renaming in it is safe. Some network file systems do not support this."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_or_log(path: str, text: str, consequence: str) -> None:
    """Write a small file as a whole. Log an error of the disk, because the run can go on without the file.

    Args:
        consequence: what happens without the file, for the message.
    """
    try:
        with written_whole(path) as file:
            file.write(text)
    except OSError as e:
        logger.error("Could not write %s (%s). %s", path, e.strerror or e, consequence)


def kept_value(path: Path, key: Any, make: Callable[[], Any]) -> Any:
    """Return the JSON value that a file keeps, or make it and write the file.

    Args:
        key: a JSON value. The file is used only if it was written with the same key.
        make: returns the value.
    """
    key = json.loads(json.dumps(key))  # as it is read back: tuples become lists
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        kept = {}
    if isinstance(kept, dict) and kept.get("key") == key:
        return kept["value"]
    path.parent.mkdir(parents=True, exist_ok=True)
    value = make()
    with written_whole(str(path)) as file:
        json.dump({"value": value, "key": key}, file, indent=2)
    return value


def read_json_lines(path: Path) -> List[Dict[str, Any]]:
    """Return the objects in a file of JSON lines, or nothing if there is no such file.

    Lines that a kill or a full disk cut are left out.
    """
    if not path.exists():
        return []
    lines = (_parsed(line) for line in path.read_text().split("\n"))
    return [line for line in lines if isinstance(line, dict)]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def mend_last_line(path: Path) -> None:
    """Complete the last of a file's JSON lines, or remove it if it is cut, before more lines are appended."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if _parsed(content[whole:].decode(errors="replace")) is not None:
        with open(path, "ab") as file:
            file.write(b"\n")
    elif whole < len(content):
        os.truncate(path, whole)


def last_line(path: Path) -> str:
    """Return the last line of a log, or "no output" if it is empty."""
    return (path.read_text().strip().splitlines() or ["no output"])[-1]
