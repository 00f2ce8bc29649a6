"""What Detectron2 v0.6 expects of packages that have moved on; each part does nothing where the real thing exists."""

import importlib
import importlib.util
import sys
import types
from typing import Any

HOW_TO_GET_DETECTRON2 = (
    "GDetKD is an add-on to Detectron2, which is not installed here. Install it beside your torch:\n"
    "    python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'\n"
    "or, in a checkout of GDetKD, let `make quickstart` build a pinned environment in .venv."
)


def require_detectron2() -> None:
    """Makes `import detectron2` work on current torch and Pillow.

    Raises:
        ImportError: Detectron2 is not installed; the message says how to get it.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(HOW_TO_GET_DETECTRON2)
    restore_pillow_linear()
    restore_numpy_aliases()
    stand_in_for_compiled_ops()


def restore_pillow_linear() -> None:
    """v0.6 names `PIL.Image.LINEAR`, an alias of BILINEAR that Pillow 10 removed."""
    import PIL.Image

    if not hasattr(PIL.Image, "LINEAR"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR


def restore_numpy_aliases() -> None:
    """v0.6 names `np.str` (in its VOC loader) and `np.bool`, aliases of Python's types that NumPy 1.24 removed."""
    import numpy

    for name, builtin in (("str", str), ("bool", bool)):
        if name not in vars(numpy):
            setattr(numpy, name, builtin)


def stand_in_for_compiled_ops() -> None:
    """v0.6 imports its compiled extension on import of its layers and metrics, even where nothing of it is used.

    An empty module stands in for just those imports, so that whatever does need an operator of it (deformable
    convolution, rotated boxes) fails by name, and whatever asks whether it is there is told that it is not.
    NMS and RoIAlign come from torchvision in any case.
    """
    if has_compiled_ops():
        return
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    try:
        importlib.import_module("detectron2.layers")
        importlib.import_module("detectron2.evaluation")
    finally:
        del sys.modules["detectron2._C"]


def has_compiled_ops() -> bool:
    """Whether Detectron2's C++ extension was built."""
    return importlib.util.find_spec("detectron2._C") is not None


def default_store() -> Any:
    """Return the key-value store that the default process group was made with. torch has no public name for it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def forget_process_groups() -> None:
    """Make Detectron2 forget the process groups that it keeps. v0.6 lacks the function that makes the local group."""
    from detectron2.utils import comm

    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group.cache_clear()
