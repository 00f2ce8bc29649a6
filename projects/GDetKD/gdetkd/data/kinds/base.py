"""The registry of dataset kinds, and the base class of a kind."""

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type

from detectron2.utils.registry import Registry

from ...errors import GDetKDError
from ..clean import Findings
from ..folders import leaves, resolve

DATASET_KIND_REGISTRY = Registry("DATASET_KIND")
DATASET_KIND_REGISTRY.__doc__ = """
Kinds of datasets that DATASETS.REGISTER can name. A kind is a subclass of `DatasetKind`.
Entries name it by its class name in lower case: `kind: coco` means the class `Coco`.
"""

Sample = Dict[str, Any]  # an image in Detectron2's format
# Maps a quirk of a dataset, as the log names it, to how often the quirk was corrected.
Counts = Dict[str, int]


class Keys(NamedTuple):
    """Name the keys that an entry must have and may have, beside `name`, `kind` and `limit`."""

    required: Collection[str]
    optional: Collection[str] = ()


class DatasetKind(ABC):
    """Read one dataset, which an entry of DATASETS.REGISTER describes.

    `register_datasets` calls `check_paths`, `check_files` and `metadata` once. Detectron2's catalog calls `load`
    whenever a program asks for the dataset.

    Attributes:
        entry: the entry, which `find_problems` accepted.
        name: the dataset's name.
        allow_outside: whether paths may lead out of the folder where they start (DATASETS.ALLOW_OUTSIDE).
        max_bad_fraction: the share of the dataset that may be unusable (INPUT.MAX_BAD_FRACTION).
    """

    # An entry has to match one of these alternatives.
    keys: ClassVar[Tuple[Keys, ...]]
    # Keys of files and folders that must exist. Detectron2's data folder is where relative paths start.
    path_keys: ClassVar[Tuple[str, ...]]
    # Keys of relative paths that start somewhere else.
    inner_path_keys: ClassVar[Tuple[str, ...]] = ()
    # Chooses the evaluator: "coco" for box and mask AP, "images" for predictions without AP.
    evaluator_type: ClassVar[str] = "coco"
    # What writes the dataset's files, as a sentence for messages.
    origin: ClassVar[str] = ""

    def __init__(self, entry: Mapping[str, Any], allow_outside: bool = False, max_bad_fraction: float = 0.01) -> None:
        self.entry = entry
        self.name: str = entry["name"]
        self.allow_outside = allow_outside
        self.max_bad_fraction = max_bad_fraction

    @classmethod
    def find_problems(cls, entry: Mapping[str, Any]) -> List[str]:
        """Return what is wrong with the keys and values of an entry, for an error message. Read no file."""
        given = set(entry) - {"name", "kind", "limit"}
        meant = max(cls.keys, key=lambda keys: len(given.intersection(keys.required)))
        problems = [f"lacks the key {key}" for key in sorted(set(meant.required) - given)]
        problems += [f"has the unknown key {key}" for key in sorted(given.difference(meant.required, meant.optional))]
        for key in cls.path_keys + cls.inner_path_keys:
            if not isinstance(entry.get(key, ""), str):
                problems.append(f"has {key} {entry[key]!r}, not text")
        classes = entry.get("classes", [])
        if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
            problems.append(f"has classes {classes!r}, not a list of texts (put numbers, yes and no in quotes)")
        return problems

    @property
    def source(self) -> str:
        """Return the file or folder that describes the dataset, for messages."""
        return next(self.path(key) for key in self.path_keys if key in self.entry)

    def path(self, key: str) -> str:
        """Return the path that a key of the entry gives, as seen from Detectron2's data folder."""
        return resolve(self.entry[key])

    def file_in(self, key: str, name: str) -> str:
        """Return the path of a file that the dataset names, in the folder that a key of the entry gives.

        Raises:
            GDetKDError: the name leads out of the folder, and DATASETS.ALLOW_OUTSIDE is False.
        """
        if leaves(name) and not self.allow_outside:
            raise GDetKDError(
                f"The dataset {self.name!r} names the file {name!r}, which leads out of {self.path(key)!r}. Correct "
                "the name, or set DATASETS.ALLOW_OUTSIDE to True."
            )
        return os.path.join(self.path(key), name)

    def check_paths(self) -> None:
        """Raise an error if a relative path of the entry leads out of the folder where it starts."""
        for key in self.path_keys + self.inner_path_keys:
            path = self.entry.get(key, "")
            is_users_choice = self.allow_outside or (key in self.path_keys and os.path.isabs(path))
            if leaves(path) and not is_users_choice:
                raise GDetKDError(
                    f"DATASETS.REGISTER: {key} {path!r} of {self.name!r} leads out of the folder where it starts. "
                    "Give an absolute path, or set DATASETS.ALLOW_OUTSIDE to True."
                )

    def check_files(self) -> None:
        """Raise an error if a file or folder of the dataset does not exist."""
        for key in self.path_keys:
            if key in self.entry and not os.path.exists(self.path(key)):
                raise GDetKDError(
                    f"The dataset {self.name!r} needs {os.path.abspath(self.path(key))!r}, which does not exist. "
                    f"{self.origin}Correct `{key}` in DATASETS.REGISTER, or set the environment variable "
                    "DETECTRON2_DATASETS to the folder that contains it."
                )

    def class_names(self) -> Optional[List[str]]:
        """Return the class names in order, or None if they are not known.

        Do not raise an error if the dataset's files do not exist: a teacher's dataset may be on another computer.
        """
        return list(self.entry["classes"]) if "classes" in self.entry else None

    def metadata(self) -> Dict[str, Any]:
        """Return what Detectron2's `MetadataCatalog` has to know before the dataset is loaded."""
        names = self.class_names()
        metadata: Dict[str, Any] = {"evaluator_type": self.evaluator_type}
        return metadata if names is None else {**metadata, "thing_classes": names}

    @abstractmethod
    def load(self) -> Tuple[List[Sample], Counts]:
        """Read all images in Detectron2's format, and count the quirks that were corrected."""

    def note_findings(self, findings: Findings) -> None:  # noqa: B027  it does nothing by default
        """Learn which annotations were left out of the loaded images. Most kinds do not need to know."""


def dataset_kinds() -> Dict[str, Type[DatasetKind]]:
    """Return the registered kinds by the name that an entry uses."""
    return {kind.__name__.lower(): kind for _, kind in DATASET_KIND_REGISTRY}


def find_kind(entry: Mapping[str, Any]) -> Optional[Type[DatasetKind]]:
    """Return the kind that an entry names, or None if no such kind is registered."""
    return next((kind for name, kind in dataset_kinds().items() if name == entry.get("kind")), None)


def describe(counts: Counts) -> str:
    """Join the quirks that were corrected into text for the log. The text is empty if there are none."""
    return "; ".join(f"{number} {name}" for name, number in counts.items())
