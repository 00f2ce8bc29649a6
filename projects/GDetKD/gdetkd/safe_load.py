"""Load weights from untrusted sources without running code that they contain."""

import errno
import hashlib
import os
import pickle
import zlib
from collections import OrderedDict
from typing import Any, BinaryIO, Dict, Sequence, Tuple

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ._compat.checkpoint import CheckpointSteps
from ._compat.pickles import names_allowed, numpy_names, refused_name
from .errors import GDetKDError
from .weights_layout import is_tensor, with_model

# Errors that the loaders raise for a file that is cut off or no weights file.
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
# System errors whose cause is the machine. The other system errors can come from a damaged file, for example if it
# makes a loader seek to a wrong place.
MACHINE_ERRORS = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.ENXIO,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)


class UntrustedFileError(GDetKDError):
    """Report a weights file that could run code."""


class DamagedFileError(GDetKDError):
    """Report a weights file that is cut off, empty, or no weights file."""


class UnreadableFileError(GDetKDError):
    """Report a weights file that cannot be read because of the disk, the access rights or the memory."""


class SafePickle(pickle.Unpickler):
    """Unpickle NumPy arrays and plain containers, and refuse every other name.

    Raises:
        UntrustedFileError: the pickle asks for another name.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote the model zoo's files

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) not in _ALLOWED:
            raise UntrustedFileError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Decode bytes as Python 3 writes them in old protocols. Any other codec would import a module."""
    if encoding != "latin1":
        raise UntrustedFileError(f"it asks for the codec {encoding!r}")
    return text.encode(encoding)


_ALLOWED: Dict[Tuple[str, str], Any] = {
    **numpy_names(),
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, bytearray)},
}


class LeftOut:
    """Stand in a file's content for an object that was not made. Calling the class with anything does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def read_weights(path: str, leave_out: Sequence[str] = ()) -> Dict[str, Any]:
    """Read a weights file of Detectron2, fvcore, pycls or Caffe2's model zoo, without running code in it.

    Args:
        path: a local path. A `.pkl` is read as a pickle of NumPy arrays, any other file in torch's format.
        leave_out: full names of classes and functions, such as "builtins.getattr", that a file in torch's format may
            ask for. They are neither imported nor called. What they would have made is a `LeftOut`.

    Raises:
        UntrustedFileError: the file holds more than tensors, arrays, numbers, strings and plain containers.
        DamagedFileError: the file is cut off, empty, missing, or no weights file.
        UnreadableFileError: the disk, the access rights or the memory prevent reading the file.
    """
    try:
        content = _read_pickle(path) if path.endswith(".pkl") else _read_torch(path, leave_out)
    except UntrustedFileError as e:
        raise UntrustedFileError(_refusal(path, str(e))) from e
    except DAMAGE as e:
        if _is_of_the_machine(e):
            raise UnreadableFileError(
                f"The weights {path!r} cannot be read here and now ({type(e).__name__}: {e}). The file itself may be "
                "intact. Check the access rights, the disk and the free memory, and try again. If you do not need the "
                "file, remove it."
            ) from e
        if asked := refused_name(e):
            raise UntrustedFileError(_refusal(path, f"it asks for {asked}")) from e
        reason = (str(e).strip().splitlines() or ["it ends too early"])[0]
        raise DamagedFileError(
            f"The weights {path!r} cannot be read ({type(e).__name__}: {reason[:200]}). Copy or download them again."
        ) from e
    if not isinstance(content, dict):
        raise DamagedFileError(
            f"The weights {path!r} hold a {type(content).__name__}, not a dictionary of tensors. Write the file by "
            "torch.save({'model': model.state_dict()}, ...)."
        )
    return content


def _is_of_the_machine(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRORS)


def _read_pickle(path: str) -> Any:
    with PathManager.open(path, "rb") as file:
        content = SafePickle(file).load()
    _check_plain(content)
    return content


def _check_plain(content: Any) -> None:
    """Raise an error if an array in the content holds Python objects. The unpickler has refused everything else."""
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


def _read_torch(path: str, leave_out: Sequence[str]) -> Any:
    with names_allowed({name: LeftOut for name in leave_out}):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(path: str, reason: str) -> str:
    return (
        f"The weights {path!r} are refused: {reason}, which could run code here. Only tensors, arrays, numbers, "
        "strings and plain containers are allowed. Nothing of it was run. If you made the file yourself, save the "
        "weights alone: torch.save({'model': model.state_dict()}, ...)."
    )


class SafeCheckpointer(CheckpointSteps):
    """Load checkpoints as Detectron2's checkpointer does, but from files that need not be trusted.

    Raises:
        UntrustedFileError, DamagedFileError, UnreadableFileError: see `read_weights`.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """Load a checkpoint.

        Raises:
            GDetKDError: there is no such file.
        """
        file = path.split("?")[0]  # Detectron2 allows options after a question mark
        if file and "://" not in file and not os.path.isfile(file):
            remedy = "Correct the path."
            if file.startswith("weights/R-"):
                remedy = "tools/convert_torchvision.py makes them (docs/recipes.md)."
            raise GDetKDError(f"The weights {file!r} are not there. The current folder is {os.getcwd()}. {remedy}")
        return super().load(path, *args, **kwargs)

    def read_torch_file(self, filename: str) -> Dict[str, Any]:
        return with_model(read_weights(filename), filename)

    def read_file(self, filename: str) -> Dict[str, Any]:
        if not filename.endswith((".pkl", ".pyth")):
            return super().read_file(filename)
        content = read_weights(filename)
        if filename.endswith(".pyth"):  # pycls writes these
            if "model_state" not in content:
                raise DamagedFileError(
                    f"The weights {filename!r} lack the key 'model_state', where pycls keeps the weights. If another "
                    "program wrote the file, rename it to .pth."
                )
            weights = content["model_state"].items()
            return _to_match({k: v for k, v in weights if not k.endswith("num_batches_tracked")}, "pycls")
        if "model" in content and "__author__" in content:  # a file of Detectron2's model zoo
            return with_model(content, filename)
        weights = content.get("blobs", content).items()
        return _to_match({k: v for k, v in weights if not k.endswith("_momentum")}, "Caffe2")


def _to_match(weights: Dict[str, Any], author: str) -> Dict[str, Any]:
    """Return a checkpoint of foreign names, which Detectron2 matches to its own names by heuristics."""
    tensors = {name: value for name, value in weights.items() if is_tensor(value)}
    return {"model": tensors, "__author__": author, "matching_heuristics": True}


def sha256_of_file(path: str) -> str:
    """Return a file's SHA-256 in hexadecimal digits. The file is read block by block, because it may be large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()
