"""The error that users meet. Its message says what is wrong and what to do."""

from typing import Sequence


class GDetKDError(ValueError):
    """Report a config, a file or a pair of detectors with which training would fail or silently go wrong."""


def some(names: Sequence[str], count: int = 10) -> str:
    """Join the first `count` names for a message, and count the rest: "cat, dog and 78 more"."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message, or "no details" if it has none."""
    return (str(error).strip().splitlines() or ["no details"])[0]
