"""The one error that users meet: it names the thing that is wrong and the remedy."""

from typing import Sequence


class GDetKDError(ValueError):
    """A config, file or pair of detectors with which training would fail, or go wrong without a word."""


def some(names: Sequence[str], count: int = 10) -> str:
    """Join the first `count` names for a message, and say how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
