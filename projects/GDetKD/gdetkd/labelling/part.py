"""Keep the boxes that are found so far in a folder beside the output, so that a killed run can continue."""

import json
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from detectron2.utils import comm

from ..data.kinds.pseudo import label_info
from ..errors import GDetKDError
from ..files import PARTIAL, mend_last_line, written_whole

ENDING = ".part"
SETTINGS = "settings.json"
# The name, the size in bytes and the SHA-256 of an image's file.
Identity = Tuple[str, int, str]


@dataclass(frozen=True)
class Found:
    """Hold the boxes of one image, as they are written.

    Attributes:
        name: name of the image.
        bytes, sha256: size of the file in bytes, and SHA-256 of its content.
        boxes: [x, y, width, height] in pixels of the file, for each box.
        scores: from 0 to 1, descending.
        classes: index among the student's classes.
        dropped: number of boxes that are left out, because the student lacks their class.
    """

    name: str
    bytes: int
    sha256: str
    boxes: List[List[float]]
    scores: List[float]
    classes: List[int]
    dropped: int

    @property
    def identity(self) -> Identity:
        return self.name, self.bytes, self.sha256


def check_output(output: Path) -> None:
    """Check the output before a long run.

    Raises:
        GDetKDError: the output cannot be written, does not end in .json, or exists and was not written by
            tools/label.py.
    """
    if output.suffix != ".json":  # the page has the same name and the ending .html
        raise GDetKDError(f"--output is {str(output)!r}. Name a file that ends in .json.")
    if output.is_file() and not _holds_found_boxes(output):
        raise GDetKDError(
            f"--output {str(output)!r} exists, and tools/label.py did not write it. Choose another file, or remove it."
        )
    trial = Path(f"{output}{PARTIAL}")
    try:
        if output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        if comm.is_main_process():
            trial.write_text("")
            trial.unlink()
    except OSError as e:
        raise GDetKDError(
            f"--output {str(output)!r} cannot be written ({e.strerror}). Choose a file in a folder with write access."
        ) from e


def _holds_found_boxes(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(label_info(content))


class Part:
    """Read and write the folder. It holds the settings, and JSON lines with a line for each image.

    Each process writes a file of its own. All processes must see the same folder.

    Args:
        output: path of the output.
        settings: everything that changes the boxes, as JSON values.

    Raises:
        GDetKDError: the folder holds boxes that were found with other settings.
    """

    def __init__(self, output: Path, settings: Dict[str, Any]) -> None:
        self.folder = Path(f"{output}{ENDING}")
        path = self.folder / SETTINGS
        before: Optional[Dict[str, Any]] = json.loads(path.read_text()) if path.exists() else None
        comm.synchronize()  # every process has read what an earlier run left
        if before is None:
            self._start(path, settings)
        elif before != settings:
            changed = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
            raise GDetKDError(
                f"{str(self.folder)!r} holds the boxes of a run that had other settings ({', '.join(changed)}), so it "
                "cannot be continued. Delete that folder, or choose another --output."
            )
        comm.synchronize()

    def _start(self, path: Path, settings: Dict[str, Any]) -> None:
        if comm.is_main_process():
            self._remove_lines()
            self.folder.mkdir(exist_ok=True)
            with written_whole(str(path)) as file:
                json.dump(settings, file, indent=1)

    def read(self, kind: str) -> Iterator[Found]:
        """Yield the boxes so far, image by image. A torn last line of a file is left out.

        Args:
            kind: which boxes, as in `detect_all`.
        """
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            with open(path) as file:
                for line in file:
                    if line.endswith("\n"):
                        yield Found(**json.loads(line))

    @contextmanager
    def appending(self, kind: str) -> Iterator[Callable[[Found], None]]:
        """Yield a function that adds the boxes of an image. A killed process loses no image that is added."""
        path = self.folder / f"{kind}-{comm.get_rank()}.jsonl"
        mend_last_line(path)
        with open(path, "a") as file:

            def add(found: Found) -> None:
                file.write(json.dumps(asdict(found)) + "\n")
                file.flush()

            yield add

    def remove(self) -> None:
        """Remove the files of the run, and the folder if it holds no other file."""
        (self.folder / SETTINGS).unlink()  # first: what a kill leaves is then no run to continue
        self._remove_lines()
        with suppress(OSError):
            self.folder.rmdir()

    def _remove_lines(self) -> None:
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
