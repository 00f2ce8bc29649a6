"""Find the place of each key in config files, and refuse a key that appears twice."""

import os
from typing import Dict, List, NamedTuple, Optional, Tuple

import yaml
from detectron2.utils.file_io import PathManager

from .errors import GDetKDError

BASE = "_BASE_"
MERGE = "<<"  # takes the keys of another mapping; several are allowed


class Place(NamedTuple):
    """Name the place of a key in a config file."""

    file: str
    line: int  # counted from 1

    def __str__(self) -> str:
        return f"{self.file!r}, line {self.line}"


def places_of_keys(path: str) -> Dict[str, Place]:
    """Return the place of each key in a file and its bases, those of a file before those of its bases.

    If several files have a key, the place is where its value comes from.

    Raises:
        GDetKDError: a file has a key twice. YAML would keep the last one, and lose the other without a word.
    """
    with PathManager.open(path, "r") as file:
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    _refuse_duplicates(root, path)
    places: Dict[str, Place] = {}
    bases: List[str] = []
    for key, node in _children(root):
        if key.value == BASE:
            bases = [item.value for item in node.value] if isinstance(node, yaml.SequenceNode) else [node.value]
            continue
        places.update(_places_below(key, node, path, ""))
    for base in reversed(bases):  # the last base counts
        base = os.path.expanduser(base)
        if not base.startswith(("/", "http://", "https://")):
            base = os.path.join(os.path.dirname(path), base)
        places = {**places, **{key: place for key, place in places_of_keys(base).items() if key not in places}}
    return places


def _children(node: Optional[yaml.Node]) -> List[Tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _places_below(key: yaml.Node, node: yaml.Node, path: str, prefix: str) -> Dict[str, Place]:
    name = f"{prefix}{key.value}"
    places = {name: Place(path, key.start_mark.line + 1)}
    for child, value in _children(node):
        places.update(_places_below(child, value, path, f"{name}."))
    return places


def _refuse_duplicates(root: Optional[yaml.Node], path: str) -> None:
    waiting, seen = [root], set()  # an anchor may be used in many places
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        lines: Dict[str, int] = {}
        for key, _ in _children(node):
            line = key.start_mark.line + 1
            if key.value in lines and key.value != MERGE:
                raise GDetKDError(
                    f"The config {Place(path, line)}: {key.value} was given before, in line {lines[key.value]}. YAML "
                    "would keep only the last one. Keep one of them. If both are groups, move all keys into one."
                )
            lines[key.value] = line
        waiting += node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in _children(node)]
