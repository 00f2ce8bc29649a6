"""Scoped forward hooks: what a detector computes on its way, seen without touching its code."""

from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from torch import nn


class Call(NamedTuple):
    """One forward call of a module."""

    inputs: Tuple[Any, ...]
    output: Any


class Recorder:
    """Records every forward call of the named modules while its context is open.

    The hooks come off on exit, on an exception too, so a module that was recorded is left as it was found.

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
        """Returns:
        for each point, the list of its calls so far, in order; it grows while the context is open.
        """
        if self._handles:
            raise RuntimeError("This Recorder is already recording; make one for each forward pass.")
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
