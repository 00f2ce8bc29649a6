"""Import the user's own modules, which register losses, detectors or datasets, before a program makes its config."""

import importlib
import os
import site
import sys
import traceback
from pathlib import Path
from types import ModuleType

from .errors import GDetKDError

# Environment variable that names the modules. Child processes inherit it, so a comparison passes it to its trainings.
VARIABLE = "GDETKD_IMPORT"


def import_user_modules() -> None:
    """Import the modules that GDETKD_IMPORT names, in this order, separated by commas.

    An entry is the path of a .py file, or the name of a module such as my_project.losses. Names are also looked for in
    the current folder. A module is imported once per process.

    Raises:
        GDetKDError: a module is not there or hides behind another module of its name, or its import fails.
    """
    for entry in os.environ.get(VARIABLE, "").split(","):
        if entry.strip():
            _import(entry.strip())


def _import(entry: str) -> None:
    path = Path(entry).resolve() if entry.endswith(".py") else None
    if path is not None and not path.is_file():
        raise GDetKDError(
            f"{VARIABLE} names the file {entry!r}, which is not there. The current folder is {os.getcwd()}. Correct "
            "the path."
        )
    if path is not None and "." in path.stem:
        raise GDetKDError(
            f"{VARIABLE} names the file {entry!r}. Python cannot import a file with a dot in its name. Rename it."
        )
    folder, name = (str(path.parent), path.stem) if path is not None else (os.getcwd(), entry)
    if folder not in sys.path:
        sys.path.append(folder)
    module = _module(entry, name)
    if path is not None and Path(str(module.__file__)).resolve() != path:
        raise GDetKDError(
            f"{VARIABLE} names the file {entry!r}, but Python finds another module {name!r} ({module.__file__}). "
            "Rename the file."
        )


def _module(entry: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except GDetKDError:
        raise
    except ModuleNotFoundError as e:
        if not f"{name}.".startswith(f"{e.name}."):
            raise GDetKDError(f"{VARIABLE} names {entry!r}, whose import needs {e.name!r}. Install it.") from e
        raise GDetKDError(
            f"{VARIABLE} names the module {entry!r}, which Python does not find. Give the path of a .py file, or add "
            "the folder of the module to PYTHONPATH."
        ) from e
    except Exception as e:
        raise GDetKDError(
            f"{VARIABLE} names {entry!r}, whose import fails: {type(e).__name__}: {e}{_place(e)}. Correct it."
        ) from e


def _place(error: Exception) -> str:
    """Return the last line of the user's that ran, in parentheses, or nothing if it is not known."""
    installed = (os.path.dirname(os.__file__), os.path.dirname(__file__), *site.getsitepackages(), "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(installed)]
    if isinstance(error, SyntaxError) or not frames:  # the text of a SyntaxError names the place itself
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
