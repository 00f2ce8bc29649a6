"""Let packages above the engine add hooks to every `DistillTrainer`."""

from typing import Any, Callable, List, NamedTuple, Sequence

from detectron2.engine import HookBase


class ExtraHooks(NamedTuple):
    """Hold the hooks to add.

    Attributes:
        before_writers: hooks that run before the hook that writes metrics.
        last: hooks that run after all of Detectron2's hooks.
    """

    before_writers: Sequence[HookBase] = ()
    last: Sequence[HookBase] = ()


# Functions that look at a trainer while it is built, and return the hooks to add. Every process calls them.
EXTENSIONS: List[Callable[[Any], ExtraHooks]] = []
