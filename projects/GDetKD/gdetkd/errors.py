"""The error that users meet. Its message says what is wrong and what to do."""

import difflib
from typing import Sequence


class GDetKDError(ValueError):
    """Report a config, a file or a pair of detectors with which training would fail or silently go wrong."""


def some(names: Sequence[str], count: int = 10) -> str:
    """Join the first `count` names for a message, and count the rest: "cat, dog and 78 more"."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def similar(name: str, known: Sequence[str], count: int = 3) -> str:
    """Return the known names that are closest to a name, for a message: "mobilenet_v2 or mobilenet_v3_large"."""
    return " or ".join(difflib.get_close_matches(name, known, n=count, cutoff=0.0))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message, or "no details" if it has none."""
    return (str(error).strip().splitlines() or ["no details"])[0]
