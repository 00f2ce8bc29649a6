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
    digest = functools.cache(sha256_of_file)  # a file may be in `paths` and in `others`

    @functools.cache
    def by_digest(size: int) -> Dict[str, str]:
        """Return a file of `others` for each SHA-256 among those of a size."""
        return {digest(other): other for other in reversed(by_size[size])}

    found = {}
    for path in paths:
        if path not in known and not os.path.exists(path):
            continue
        size = known[path][0] if path in known else os.path.getsize(path)
        if size in by_size:
            own = known[path][1] if path in known else digest(path)
            if own in by_digest(size):
                found[path] = by_digest(size)[own]
    return found
