"""Checkpoints that are whole or not there, and resuming from the last one that can be read."""

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
    """Detectron2's path manager, whose local files are written whole."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        if "w" not in mode or "://" in path:
            return self._files.open(path, mode, **kwargs)
        return written_whole(path, mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


class DurableCheckpointer(SafeCheckpointer):
    """Writes a checkpoint to a temporary file, syncs and renames it, and goes on when the disk is full.

    Resuming takes the checkpoint that `last_checkpoint` names and, where that one is damaged, the one before.

    Attributes:
        failed: names of checkpoints that could not be written.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _WholeFiles(self.path_manager)
        self.failed: List[str] = []
        self._tagging = True
        self._already_read: Optional[Tuple[str, Dict[str, Any]]] = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes NAME.pth and makes it the checkpoint to resume from; an error of the disk is logged, not raised."""
        try:
            super().save(name, **kwargs)
        except OSError as e:
            self.failed.append(name)
            last = os.path.basename(self.get_checkpoint_file()) or "none"
            logger.error(
                "The checkpoint %s.pth could NOT be written (%s). Training goes on; the last that can be resumed from "
                "is %s. Make room in %s.",
                name,
                e.strerror or e,
                last,
                os.path.abspath(self.save_dir),
            )

    def save_aside(self, name: str, **kwargs: Any) -> None:
        """Writes NAME.pth, which is not resumed from unless `last_checkpoint` is made to name it."""
        self._tagging = False
        try:
            self.save(name, **kwargs)
        finally:
            self._tagging = True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._tagging:
            super().tag_last_checkpoint(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether the main process sees one to resume from; every process has to ask at once."""
        return bool(self._candidates())

    def _candidates(self) -> List[str]:
        """Paths of the checkpoints to resume from, the first choice first: the main process's, everywhere.

        Another may see the folder of a moment before, on a file system that they share.
        """
        return comm.all_gather(self._candidates_seen_here() if comm.is_main_process() else [])[0]

    def _candidates_seen_here(self) -> List[str]:
        if not os.path.isdir(self.save_dir):
            return []
        tagged = os.path.basename(self.get_checkpoint_file())
        numbered = sorted(filter(NUMBERED.fullmatch, os.listdir(self.save_dir)), reverse=True)
        match = NUMBERED.fullmatch(tagged)
        # One later than the tagged is of another attempt, or was set aside by hand.
        older = [name for name in numbered if name < tagged or match is None]
        path = [self.get_checkpoint_file()] if tagged else []
        return path + [os.path.join(self.save_dir, name) for name in older]

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """
        Raises:
            GDetKDError: none of the checkpoints can be read, the one to resume from is not of a training, or a process
                does not see the one that the main process does, or cannot read it for a reason that is not the file's.
        """
        if not resume or not self.has_checkpoint():
            return self.load(path, checkpointables=[])
        # An evaluation may look into the folder of a training that is just writing.
        if self.save_to_disk and "trainer" in self.checkpointables:
            for name in os.listdir(self.save_dir):
                if name.endswith(PARTIAL):
                    os.remove(os.path.join(self.save_dir, name))
        return self.load(self._read_newest())

    def _read_newest(self) -> str:
        """Reads the first candidate that every process can read; its path."""
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
            if trouble:  # of whichever process, it ends all
                raise UnreadableFileError(trouble)
            if damage:
                logger.warning("%s It is passed over for the checkpoint before.", damage)
                damages.append(damage)
                continue
            if "trainer" in self.checkpointables and "trainer" not in content:
                raise GDetKDError(
                    f"{path!r} holds weights alone, from which no training can be resumed. Start from it with "
                    "MODEL.WEIGHTS, without --resume."
                )
            self._already_read = (path, content)
            return path
        raise GDetKDError(
            f"No checkpoint in {self.save_dir!r} can be resumed from: {' '.join(damages)} Remove them to start anew."
        )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        path, content = self._already_read or ("", {})
        self._already_read = None
        return content if path == filename else super()._load_file(filename)


def _check_seen_by_all(path: str) -> None:
    """A file that is gone is passed over by all; one that is there for the main process alone can be no shared start.

    Raises:
        GDetKDError: on every process, some do not see the file.
    """
    is_seen = comm.all_gather(os.path.isfile(path))
    blind = [rank for rank, seen in enumerate(is_seen) if not seen]
    if is_seen[0] and blind:
        raise GDetKDError(
            f"The checkpoint {path!r} is not there for the process of rank {', '.join(map(str, blind))}, though it is "
            "for the main one. OUTPUT_DIR has to be on a file system that all processes share, or copy the file there."
        )
