"""Let Detectron2 v0.6 be imported beside current packages. Detectron2 main needs none of this."""

import importlib
import importlib.util
import os
import re
import sys
import types

HOW_TO_GET_DETECTRON2 = (
    "GDetKD is an add-on to Detectron2, which is not installed here. Install it beside your torch:\n"
    "    python -m pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'\n"
    "or, in a checkout of GDetKD, let `make quickstart` build a pinned environment in .venv."
)
# Aliases of Python's types that NumPy 1.24 removed, and a file of Detectron2 v0.6 that names each alias.
NUMPY_ALIASES = {"str": (str, "data/datasets/pascal_voc.py"), "bool": (bool, "structures/masks.py")}


def require_detectron2() -> None:
    """Make `import detectron2` work on current torch, NumPy and Pillow.

    Raises:
        ImportError: Detectron2 is not installed. The message says how to get it.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(HOW_TO_GET_DETECTRON2)
    restore_pillow_linear()
    restore_numpy_aliases()
    stand_in_for_compiled_ops()


def detectron2_names(file: str, pattern: str) -> bool:
    """Return whether a source file of the installed Detectron2 matches a pattern. Nothing is imported.

    The version number does not tell: Detectron2 main still calls itself 0.6.
    """
    (folder,) = importlib.util.find_spec("detectron2").submodule_search_locations
    path = os.path.join(folder, *file.split("/"))
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8") as source:
        return re.search(pattern, source.read(), re.MULTILINE) is not None


def restore_pillow_linear() -> None:
    """Restore `PIL.Image.LINEAR`, an alias of BILINEAR that Pillow 10 removed. Detectron2 v0.6 names it."""
    import PIL.Image

    if not hasattr(PIL.Image, "LINEAR") and detectron2_names("data/transforms/transform.py", r"\bImage\.LINEAR\b"):
        PIL.Image.LINEAR = PIL.Image.BILINEAR


def restore_numpy_aliases() -> None:
    """Restore `numpy.str` and `numpy.bool` if Detectron2 names them, as v0.6 does."""
    import numpy

    for name, (builtin, file) in NUMPY_ALIASES.items():
        if name not in vars(numpy) and detectron2_names(file, rf"\bnp\.{name}\b"):
            setattr(numpy, name, builtin)


def stand_in_for_compiled_ops() -> None:
    """Import Detectron2 v0.6's layers and metrics without its compiled extension.

    v0.6 imports the extension there even if no operator of it is used. An empty module stands in for these imports
    alone. So code that needs an operator (deformable convolution, rotated boxes) still fails by name, and code that
    asks for the extension learns that it is missing. NMS and RoIAlign come from torchvision.
    """
    if has_compiled_ops() or not imports_compiled_ops():
        return
    sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
    try:
        importlib.import_module("detectron2.layers")
        importlib.import_module("detectron2.evaluation")
    finally:
        del sys.modules["detectron2._C"]


def imports_compiled_ops() -> bool:
    """Return whether Detectron2's layers import its C++ extension unconditionally, as v0.6's do."""
    return detectron2_names("layers/deform_conv.py", r"^from detectron2 import _C\b")


def has_compiled_ops() -> bool:
    """Return whether Detectron2's C++ extension was built."""
    return importlib.util.find_spec("detectron2._C") is not None
