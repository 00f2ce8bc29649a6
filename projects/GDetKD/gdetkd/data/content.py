"""Find images that are in two datasets, whatever their names are."""

import functools
import os
from collections import defaultdict
from typing import Dict, List, Sequence

from ..safe_load import sha256_of_file


def same_files(paths: Sequence[str], others: Sequence[str]) -> Dict[str, str]:
    """Return the files of `paths` that have the same bytes as a file of `others`, and that file.

    Only files of the same size are read. A file that does not exist is left out.
    """
    by_size: Dict[int, List[str]] = defaultdict(list)
    for other in others:
        if os.path.exists(other):
            by_size[os.path.getsize(other)].append(other)
    digest = functools.lru_cache(maxsize=None)(sha256_of_file)
    found = {}
    for path in paths:
        candidates = by_size.get(os.path.getsize(path), []) if os.path.exists(path) else []
        if candidates:
            same = [other for other in candidates if digest(other) == digest(path)]
            found.update({path: same[0]} if same else {})
    return found
