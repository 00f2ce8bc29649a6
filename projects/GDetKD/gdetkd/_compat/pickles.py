"""Know the names in pickles: NumPy's functions for arrays, and the names that torch's loader refuses."""

import pickle
import re
from contextlib import AbstractContextManager
from typing import Any, Dict, Mapping, Tuple

import numpy as np
import torch

# Lines in which torch's loader refuses a name, and the place of the name in such a line.
REFUSAL = re.compile(r"nsupported (global|class)|unsupported GLOBAL|reduce for|instantiate")
REFUSED_NAME = re.compile(r"GLOBAL (\S+)|class (\S+)|function (\S+)")


def numpy_names() -> Dict[Tuple[str, str], Any]:
    """Return what pickles of NumPy's arrays and scalars name, by module and name.

    Pickles of NumPy 1 and of NumPy 2 up to 2.4 name private functions of NumPy. An array tells which these are.
    """
    array = np.zeros(1)
    names: Dict[Tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        names[f"{package}.multiarray", "scalar"] = array[0].__reduce__()[0]
        names[f"{package}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return names


def names_allowed(stand_ins: Mapping[str, type]) -> AbstractContextManager:
    """Let torch's loader read NumPy's arrays and scalars inside. No torch up to 2.15 does so by itself.

    Plain Detectron2 can write NumPy numbers beside the weights. NumPy up to 1.24 has no `numpy.dtypes`.

    Args:
        stand_ins: classes to use for further names in the file, by full name.
    """
    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__] if hasattr(np, "dtypes") else []
    named = [(value, f"{module}.{name}") for (module, name), value in numpy_names().items()]
    others = [(stand_in, name) for name, stand_in in stand_ins.items()]
    return torch.serialization.safe_globals([*named, *kinds, *others])


def refused_name(error: BaseException) -> str:
    """Return the name that torch's loader refused, or "" if it failed for another reason.

    The loader of torch up to 2.15 raises the same error for a name that it refuses and for a damaged file. Only the
    message differs.
    """
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    for line in str(error).splitlines():
        if REFUSAL.search(line):
            match = REFUSED_NAME.search(line)
            return next(filter(None, match.groups()), "") if match else line.strip()
    return ""
