"""Find images that are in two datasets, whatever their names are."""

import functools
import os
from collections import defaultdict
from types import MappingProxyType
from typing import Dict, List, Mapping, Sequence, Tuple

from ..safe_load import sha256_of_file


def same_files(
    paths: Sequence[str], others: Sequence[str], known: Mapping[str, Tuple[int, str]] = MappingProxyType({})
) -> Dict[str, str]:
    """Return the files of `paths` that have the same bytes as a file of `others`, and that file.

    Only files of the same size are read. A file that does not exist is left out.

    Args:
        known: size in bytes and SHA-256 of files of `paths`, which then are not read.
    """
    by_size: Dict[int, List[str]] = defaultdict(list)
    for other in others:
        if os.path.exists(other):
            by_size[os.path.getsize(other)].append(other)
    digest = functools.lru_cache(maxsize=None)(sha256_of_file)
    found = {}
    for path in paths:
        if path not in known and not os.path.exists(path):
            continue
        candidates = by_size.get(known[path][0] if path in known else os.path.getsize(path), [])
        if candidates:
            own = known[path][1] if path in known else digest(path)
            same = [other for other in candidates if digest(other) == own]
            found.update({path: same[0]} if same else {})
    return found
