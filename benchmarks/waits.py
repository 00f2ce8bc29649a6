"""Count the operations of a step that make the CPU wait for a GPU, without a GPU.

On a GPU the CPU only queues operations. It must wait if Python needs a value (`item`, `tolist`), if the shape of a
result depends on values (`nonzero`, a boolean index, NMS), or if it copies from memory that is not pinned.

The count runs on a CPU. It takes parameters and buffers as tensors on the device, and follows them through the step.
Tensors made from Python numbers without a device are on the host, and so are the batch's tensors.
"""

import inspect
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from typing import Counter as Counts

import gdetkd
from gdetkd.distiller import GDetKD

import detectron2  # isort: skip
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result has a shape that depends on values, or that is a Python number.
WAITING = {
    "aten::_local_scalar_dense": "value read by Python",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "boolean index",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::equal": "equal",
    "aten::bincount": "bincount",
    "torchvision::nms": "NMS",
}
# A place in the code: file, line and kind of the operation.
Place = Tuple[str, int, str]
# The code to name.
ROOTS = tuple(Path(module.__file__).parent for module in (detectron2, gdetkd))
FACTORIES = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand)


class WaitCounter:
    """Count the waits inside a `with` block, by place.

    Args:
        host: tensors that lie on the host, such as those of a batch.
        roots: folders of the code to name. A wait is counted for the innermost frame in one of them.

    Attributes:
        places: number of waits by place.
    """

    def __init__(self, host: Sequence[torch.Tensor], roots: Sequence[Path]) -> None:
        self.places: Counts[Place] = Counter()
        self._roots = [str(root) for root in roots]
        # The references keep the memory alive, so that no later tensor gets the same address.
        self._kept: List[torch.Tensor] = []
        self._addresses: set = set()
        self._stack = ExitStack()
        for tensor in host:
            self.keep_on_host(tensor)

    def __enter__(self) -> "WaitCounter":
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def keep_on_host(self, tensor: torch.Tensor) -> None:
        """Remember that a tensor lies on the host."""
        self._kept.append(tensor)
        self._addresses.add(tensor.untyped_storage().data_ptr())

    def keep_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that a tensor lies on the device, and return it."""
        self._kept.append(tensor)
        self._addresses.discard(tensor.untyped_storage().data_ptr())
        return tensor

    def on_host(self, tensor: torch.Tensor) -> bool:
        # An empty tensor has no address, and no values to wait for.
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self._addresses

    def count(self, kind: str) -> None:
        """Count a wait of the innermost frame that belongs to the named code."""
        frame = inspect.currentframe()
        while frame is not None:
            name = frame.f_code.co_filename
            if any(name.startswith(root) for root in self._roots):
                self.places[name, frame.f_lineno, kind] += 1
                return
            frame = frame.f_back
        self.places["elsewhere", 0, kind] += 1


class _Operations(TorchDispatchMode):
    """Find the operations that wait, and follow what lies on the host."""

    def __init__(self, counter: WaitCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_in((args, kwargs))
        on_host = bool(tensors) and all(map(self._counter.on_host, tensors))
        kind = None if on_host else _kind(func, args, kwargs)
        if kind is not None:
            self._counter.count(kind)
        result = func(*args, **kwargs)
        if on_host:
            for tensor in _tensors_in(result):
                self._counter.keep_on_host(tensor)
        return result


def _tensors_in(value: Any) -> List[torch.Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors_in(item)] if isinstance(value, (list, tuple)) else []


def _kind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[str]:
    name = func.name().split(".")[0]  # without the overload
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        # One number for all places of a mask becomes `masked_fill`, which does not wait.
        fills = name != "aten::index" and args[2].numel() == 1
        return "boolean index" if by_mask and not fills else None
    if name == "aten::repeat_interleave":
        return None if kwargs.get("output_size") is not None else "repeat_interleave"
    return WAITING.get(name)


class _Calls(TorchFunctionMode):
    """Find the calls that copy between host and device. On a CPU they do not reach the dispatcher."""

    def __init__(self, counter: WaitCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in FACTORIES or name == "new_tensor":
            return self._make(func, name, args, kwargs)
        if name in ("to", "cuda") and self._moves(args, kwargs):
            if not kwargs.get("non_blocking"):
                self._counter.count("copy to the device")
            return self._counter.keep_on_device(func(*args, **kwargs).clone())
        if name in ("tolist", "numpy", "cpu") and not self._counter.on_host(args[0]):
            self._counter.count("value read by Python")
            result = func(*args, **kwargs)
            if name == "cpu":
                result = result.clone()
                self._counter.keep_on_host(result)
            return result
        if name in ("__getitem__", "__setitem__") and not self._counter.on_host(args[0]):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(key, list) for key in keys):
                self._counter.count("copy to the device")
        return func(*args, **kwargs)

    def _make(self, func: Any, name: str, args: Any, kwargs: Dict[str, Any]) -> torch.Tensor:
        result = func(*args, **kwargs)
        given = _tensors_in(args)
        from_numbers = func in (torch.tensor, torch.as_tensor) and not given or name == "new_tensor"
        if name != "new_tensor" and kwargs.get("device") is None and not given:
            self._counter.keep_on_host(result)
        elif from_numbers and result.numel():
            self._counter.count("copy to the device")
        return result

    def _moves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        target = [*args[1:], *kwargs.values()]
        has_device = any(isinstance(value, (torch.device, str)) for value in target)
        return has_device and args[0].numel() > 0 and self._counter.on_host(args[0])


def count_waits(model: torch.nn.Module, batch: List[Dict[str, Any]]) -> Counts[Place]:
    """Count the waits in one forward and backward pass of a detector or a distiller, after a first pass.

    The first pass makes what is kept, such as anchors.
    """
    for counter in (None, WaitCounter(tensors_of(batch), ROOTS)):
        with EventStorage(), counter or nullcontext():
            sum(model(batch).values()).backward()
        model.zero_grad(set_to_none=True)
    return counter.places


def added_waits(model: GDetKD, batch: List[Dict[str, Any]]) -> Counts[Place]:
    """Count the waits that distillation adds to a plain step of the student."""
    return count_waits(model, batch) - count_waits(model.student, batch)


def tensors_of(batch: Sequence[Mapping[str, Any]]) -> List[torch.Tensor]:
    """Return the tensors of a training batch, in Detectron2's format."""
    found = []
    for sample in batch:
        values = [field for value in sample.values() for field in _fields(value)]
        found += [value.tensor if isinstance(value, Boxes) else value for value in values]
    return [value for value in found if isinstance(value, torch.Tensor)]


def _fields(value: Any) -> List[Any]:
    return list(value.get_fields().values()) if isinstance(value, Instances) else [value]
