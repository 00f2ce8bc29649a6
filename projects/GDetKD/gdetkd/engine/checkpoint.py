"""Write each checkpoint as a whole file, and resume from the newest checkpoint that can be read."""

import logging
import os
import re
from typing import Any, Dict, List, Optional, Tuple

from detectron2.utils import comm
from torch import nn

from ..errors import GDetKDError
from ..files import PARTIAL, written_whole
from ..safe_load import DamagedFileError, SafeCheckpointer, UnreadableFileError, read_weights

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"model_(\d{7})\.pth")


class _WholeFiles:
    """Open files as Detectron2's path manager does, but write each local file as a whole."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" not in mode or "://" in path:
            return self._files.open(path, mode, **kwargs)
        return written_whole(path, mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


class DurableCheckpointer(SafeCheckpointer):
    """Write a checkpoint to a temporary file, sync and rename it, and go on when the disk is full.

    Resuming takes the checkpoint that `last_checkpoint` names, or an earlier checkpoint if that file is damaged.

    Attributes:
        failed: names of checkpoints that could not be written.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _WholeFiles(self.path_manager)
        self.failed: List[str] = []
        self._tagging = True
        self.resumed_from = ""  # path of the checkpoint
        self._already_read: Optional[Tuple[str, Dict[str, Any]]] = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth, the checkpoint to resume from. An error of the disk is logged, not raised."""
        try:
            super().save(name, **kwargs)
        except OSError as e:
            self.failed.append(name)
            last = os.path.basename(self.get_checkpoint_file()) or "none"
            logger.error(
                "The checkpoint %s.pth could NOT be written (%s). Training goes on. The last checkpoint to resume from "
                "is %s. Make room in %s.",
                name,
                e.strerror or e,
                last,
                os.path.abspath(self.save_dir),
            )

    def save_aside(self, name: str, **kwargs: Any) -> None:
        """Write NAME.pth, which a run resumes from only if a user writes its name into `last_checkpoint`."""
        self._tagging = False
        try:
            self.save(name, **kwargs)
        finally:
            self._tagging = True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._tagging:
            super().tag_last_checkpoint(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Return whether the main process sees a checkpoint to resume from. All processes must call this together."""
        return bool(self._candidates())

    def _candidates(self) -> List[str]:
        """Return the paths of the checkpoints to resume from, the first choice first.

        The list of the main process counts. On a shared file system another process may see an older folder.
        """
        return comm.all_gather(self._candidates_seen_here() if comm.is_main_process() else [])[0]

    def _candidates_seen_here(self) -> List[str]:
        if not os.path.isdir(self.save_dir):
            return []
        tagged = os.path.basename(self.get_checkpoint_file())
        numbered = sorted(filter(NUMBERED.fullmatch, os.listdir(self.save_dir)), reverse=True)
        match = NUMBERED.fullmatch(tagged)
        # A checkpoint later than the tagged file is of another attempt, or a user set it aside.
        older = [name for name in numbered if name < tagged or match is None]
        path = [self.get_checkpoint_file()] if tagged else []
        return path + [os.path.join(self.save_dir, name) for name in older]

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Resume from the newest checkpoint that can be read, or load `path` if there is no checkpoint.

        Raises:
            GDetKDError: no checkpoint can be read; or the checkpoint to resume from holds weights alone; or a process
                cannot see or read a file that the main process sees.
        """
        if not resume or not self.has_checkpoint():
            return self.load(path, checkpointables=[])
        # An evaluation has no "trainer": it may look into the folder of a training that is writing.
        if self.save_to_disk and "trainer" in self.checkpointables:
            for name in os.listdir(self.save_dir):
                if name.endswith(PARTIAL):
                    os.remove(os.path.join(self.save_dir, name))
        self.resumed_from = self._read_newest()
        return self.load(self.resumed_from)

    def _read_newest(self) -> str:
        """Read the first candidate that every process can read. Return its path."""
        damages = []
        for path in self._candidates():
            _check_seen_by_all(path)
            damage, trouble, content = "", "", {}
            try:
                content = read_weights(path)
            except DamagedFileError as e:
                damage = str(e)
            except UnreadableFileError as e:
                trouble = str(e)
            damage, trouble = map(max, zip(*comm.all_gather((damage, trouble))))
            if trouble:  # on one process, it ends all processes
                raise UnreadableFileError(trouble)
            if damage:
                logger.warning("%s The run resumes from an earlier checkpoint instead.", damage)
                damages.append(damage)
                continue
            if "trainer" in self.checkpointables and "trainer" not in content:
                raise GDetKDError(
                    f"{path!r} holds weights alone, so no training can be resumed from it. To start from them, "
                    "set MODEL.WEIGHTS to this file and leave out --resume."
                )
            self._already_read = (path, content)
            return path
        raise GDetKDError(
            f"No checkpoint in {self.save_dir!r} can be read: {' '.join(damages)} Remove them to start anew."
        )

    def read_file(self, filename: str) -> Dict[str, Any]:
        path, content = self._already_read or ("", {})
        self._already_read = None
        return content if path == filename else super().read_file(filename)


def _check_seen_by_all(path: str) -> None:
    """Check that all processes see a file that the main process sees. All processes must call this together.

    Raises:
        GDetKDError: on every process, a process does not see the file.
    """
    is_seen = comm.all_gather(os.path.isfile(path))
    blind = [rank for rank, seen in enumerate(is_seen) if not seen]
    if is_seen[0] and blind:
        raise GDetKDError(
            f"The main process sees the checkpoint {path!r}, but the process of rank {', '.join(map(str, blind))} does "
            "not. Put OUTPUT_DIR on a file system that all processes share, or copy the file there."
        )
