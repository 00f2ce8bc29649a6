"""Hooks that a package above the engine adds to every `DistillTrainer`."""

from typing import Any, Callable, List, NamedTuple, Sequence

from detectron2.engine import HookBase


class ExtraHooks(NamedTuple):
    """Hooks to add.

    Attributes:
        before_writers: run before the hook that writes metrics.
        last: run after it.
    """

    before_writers: Sequence[HookBase] = ()
    last: Sequence[HookBase] = ()


# Functions that look at a trainer while it is built, and return the hooks to add. Every process calls them.
EXTENSIONS: List[Callable[[Any], ExtraHooks]] = []
