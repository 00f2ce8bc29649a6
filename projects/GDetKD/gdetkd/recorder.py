"""Record the forward calls of modules, or replace a method for a while, without changes to the detector's code."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Tuple

from torch import nn


class Call(NamedTuple):
    """Hold the inputs and the output of a module's forward call."""

    inputs: Tuple[Any, ...]
    output: Any


class Recorder:
    """Record every forward call of the named modules inside a `with` block.

    The hooks are removed at the end of the block, also after an exception.

    Example:
        with Recorder({"pyramid": model.backbone}) as calls:
            losses = model(batch)
        pyramid = calls["pyramid"][0].output
    """

    def __init__(self, points: Mapping[str, nn.Module]) -> None:
        self._points = dict(points)
        self._handles: List[Any] = []
        self._calls: Dict[str, List[Call]] = {}

    def __enter__(self) -> Dict[str, List[Call]]:
        """Start recording. Return the calls by point, in order. The lists grow until the block ends."""
        if self._handles:
            raise RuntimeError("This Recorder is already recording. Make a new Recorder for each forward pass.")
        self._calls = {name: [] for name in self._points}
        for name, module in self._points.items():
            self._handles.append(module.register_forward_hook(self._record_to(self._calls[name])))
        return self._calls

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @staticmethod
    def _record_to(calls: List[Call]):
        def hook(module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
            calls.append(Call(inputs, output))

        return hook


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a method of one object inside a `with` block.

    Args:
        make: returns the new function for the original method.
    """
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)  # the class still has the original
