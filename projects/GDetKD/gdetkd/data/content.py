"""Find images that are in two datasets, whatever their names are."""

import hashlib
import os
from collections import defaultdict
from typing import Dict, List, Sequence


def same_files(paths: Sequence[str], others: Sequence[str]) -> Dict[str, str]:
    """Return the files of `paths` that have the same bytes as a file of `others`, and that file.

    Only files of the same size are read. A file that does not exist is left out.
    """
    by_size: Dict[int, List[str]] = defaultdict(list)
    for other in others:
        if os.path.exists(other):
            by_size[os.path.getsize(other)].append(other)
    hashes: Dict[str, str] = {}
    found = {}
    for path in paths:
        candidates = by_size.get(os.path.getsize(path), []) if os.path.exists(path) else []
        if candidates:
            same = [other for other in candidates if _hash(other, hashes) == _hash(path, hashes)]
            found.update({path: same[0]} if same else {})
    return found


def _hash(path: str, known: Dict[str, str]) -> str:
    if path not in known:
        with open(path, "rb") as file:
            known[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[path]
