"""Load weights from untrusted sources without running code that they contain."""

import errno
import hashlib
import os
import pickle
import re
import zlib
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, Dict, Tuple

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from fvcore.common.checkpoint import Checkpointer

from .errors import GDetKDError
from .weights_layout import is_tensor, with_model

# How torch's loader says that a file asks for something else than tensors and plain containers.
REFUSAL = re.compile(r"GLOBAL (\S+)|class (\S+)|function (\S+)")
# What a file that is cut off or is none of the kind makes the loaders raise.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    MemoryError,
    OverflowError,
    zlib.error,
)


# Of errors of the system, those that say nothing of a file: a damaged one can make a loader seek where nothing is.
OF_THE_MACHINE = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)


class UntrustedFileError(GDetKDError):
    """A weights file that wants to run code, or holds what can do so."""


class DamagedFileError(GDetKDError):
    """A weights file that is cut off, empty, or none."""


class UnreadableFileError(GDetKDError):
    """A weights file that the disk does not give now, or the memory does not hold, whatever is in it."""


class SafePickle(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers, and refuses every other name.

    Raises:
        UntrustedFileError: the pickle names something else.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # the model zoo's files were written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) not in _ALLOWED:
            raise UntrustedFileError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in old protocols. Any other codec would be a module to import."""
    if encoding != "latin1":
        raise UntrustedFileError(f"it asks for the codec {encoding!r}")
    return text.encode(encoding)


def _numpy_names() -> Dict[Tuple[str, str], Any]:
    """NumPy's functions that rebuild arrays and scalars, under the names that NumPy 1 and 2 pickle them by."""
    core = getattr(np, "_core", None) or np.core
    names: Dict[Tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        names[f"{package}.multiarray", "scalar"] = core.multiarray.scalar
        names[f"{package}.numeric", "_frombuffer"] = core.numeric._frombuffer
    return names


_ALLOWED: Dict[Tuple[str, str], Any] = {
    **_numpy_names(),
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, bytearray)},
}


def read_weights(path: str) -> Dict[str, Any]:
    """Reads a weights file of Detectron2's, fvcore's or pycls', or of Caffe2's model zoo, and runs nothing of it.

    Args:
        path: on this machine. `.pkl` is read as a pickle of NumPy arrays, anything else as torch's format.

    Raises:
        UntrustedFileError: it holds something else than tensors, arrays, numbers, strings and plain containers.
        DamagedFileError: it is cut off, empty, not there, or none of these files.
        UnreadableFileError: the disk does not give it, or the memory does not hold it.
    """
    try:
        content = _read_pickle(path) if path.endswith(".pkl") else _read_torch(path)
    except UntrustedFileError as e:
        raise UntrustedFileError(_refusal(path, str(e))) from e
    except DAMAGE as e:
        if _is_of_the_machine(e):
            raise UnreadableFileError(
                f"The weights {path!r} cannot be read here and now ({type(e).__name__}: {e}), which says nothing of "
                "the file. Try again, with access to it and memory for it; or remove it to do without."
            ) from e
        if asked := _asked_for(e):
            raise UntrustedFileError(_refusal(path, f"it asks for {asked}")) from e
        reason = (str(e).strip().splitlines() or ["it ends too early"])[0]
        raise DamagedFileError(
            f"The weights {path!r} cannot be read ({type(e).__name__}: {reason[:200]}). Copy or download them again."
        ) from e
    if not isinstance(content, dict):
        raise DamagedFileError(f"The weights {path!r} hold a {type(content).__name__}, not a dictionary of tensors.")
    return content


def _is_of_the_machine(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_THE_MACHINE)


def _read_pickle(path: str) -> Any:
    with PathManager.open(path, "rb") as file:
        content = SafePickle(file).load()
    _check_plain(content)
    return content


def _check_plain(content: Any) -> None:
    """An array of Python objects is the one way to bring in something else."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif isinstance(item, np.ndarray) and item.dtype.hasobject:
            raise UntrustedFileError("it holds an array of Python objects")


def _read_torch(path: str) -> Any:
    with _numpy_allowed():
        return torch.load(path, map_location="cpu", weights_only=True)


def _numpy_allowed() -> AbstractContextManager:
    """Plain Detectron2's checkpoints can hold NumPy's numbers beside the weights."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__] if hasattr(np, "dtypes") else []
    named = [(value, f"{module}.{name}") for (module, name), value in _numpy_names().items()]
    return torch.serialization.safe_globals([*named, *kinds])


def _asked_for(error: BaseException) -> str:
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    for line in str(error).splitlines():
        if re.search(r"nsupported (global|class)|unsupported GLOBAL|reduce for|instantiate", line):
            match = REFUSAL.search(line)
            return next(filter(None, match.groups()), "") if match else line.strip()
    return ""


def _refusal(path: str, reason: str) -> str:
    return (
        f"The weights {path!r} are refused: {reason}, which is neither a tensor nor an array, a number, a string or a "
        "plain container, and could run code here. Nothing of it was run. If you made the file yourself, write its "
        "weights alone: torch.save({'model': model.state_dict()}, ...)."
    )


class _SafeTorchFormat(Checkpointer):
    """Stands behind Detectron2's checkpointer, which asks it for torch's format."""

    def _load_file(self, f: str) -> Dict[str, Any]:
        return with_model(read_weights(f), f)


class SafeCheckpointer(DetectionCheckpointer, _SafeTorchFormat):
    """Detectron2's checkpointer, for files from strangers.

    Raises:
        UntrustedFileError, DamagedFileError, UnreadableFileError: on loading; see `read_weights`.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """
        Raises:
            GDetKDError: there is no such file.
        """
        file = path.split("?")[0]  # Detectron2 takes options behind it
        if file and "://" not in file and not os.path.isfile(file):
            hint = " tools/convert_torchvision.py makes it: docs/recipes.md." if file.startswith("weights/R-") else ""
            raise GDetKDError(f"The weights {file!r} are not there, seen from {os.getcwd()}.{hint}")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        content = read_weights(filename)
        if filename.endswith(".pyth"):  # of pycls
            if "model_state" not in content:
                raise DamagedFileError(f"{filename!r} lacks 'model_state', where pycls keeps the weights.")
            weights = content["model_state"].items()
            return _of_other_names({k: v for k, v in weights if not k.endswith("num_batches_tracked")}, "pycls")
        if "model" in content and "__author__" in content:  # of Detectron2's model zoo
            return with_model(content, filename)
        weights = content.get("blobs", content).items()
        return _of_other_names({k: v for k, v in weights if not k.endswith("_momentum")}, "Caffe2")


def _of_other_names(weights: Dict[str, Any], author: str) -> Dict[str, Any]:
    """Detectron2 finds out by heuristics which of the weights is which of its own."""
    tensors = {name: value for name, value in weights.items() if is_tensor(value)}
    return {"model": tensors, "__author__": author, "matching_heuristics": True}


def sha256_of_file(path: str) -> str:
    """In hexadecimal digits; block by block, for weights may be large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
