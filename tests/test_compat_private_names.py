"""No file touches a private name of another library, such as Detectron2 or torch. `gdetkd._compat` does."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

import gdetkd._compat

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "projects" / "GDetKD" / "gdetkd"
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "train_net.py",
        *(path for folder in ("projects", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
    ]
    if PACKAGE / "_compat" not in path.parents
)
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(gdetkd.__path__, "gdetkd.")
    if not info.ispkg and not info.name.startswith("gdetkd._compat.")
)
UPSTREAM = ("detectron2.", "fvcore.", "torch.", "pycocotools.", "yacs.", "iopath.", "omegaconf.")
# Private names that their libraries document for use by others.
DOCUMENTED = {
    "os._exit",
    "torch.utils._python_dispatch.TorchDispatchMode",
    # torch's docstrings name these two for modules that save and load their state in their own way.
    "super()._save_to_state_dict",
    "super()._load_from_state_dict",
}
READERS = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names_of_others(tree):
    """Yield each private name that a file takes from another object or module, with its line.

    These are `object._name` unless the object is `self` or `cls`, `getattr(object, "_name")` and its like, and imports.
    """
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            owner, name = node.args[:2]
            is_text = isinstance(name, ast.Constant) and isinstance(name.value, str)
            found = [ast.unparse(node)] if is_text and is_private(name.value) and not is_own(owner) else []
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            source = getattr(node, "module", None) or ""
            paths = [f"{source}.{alias.name}" for alias in node.names]
            # A file may import a private module of its own package: gdetkd._compat.
            is_from_here = getattr(node, "level", 0) > 0 or source.split(".")[0] == "gdetkd"
            found = [] if is_from_here else [path for path in paths if any(map(is_private, path.split(".")))]
            # Names inside of modules are private, too.
            found += [path for path in paths if is_from_here and is_private(path.split(".")[-1])]
        yield from (f"line {node.lineno}: {name}" for name in found)


@cache
def names_of_self(kind, only_set=False):
    """Return the private methods that a class defines, and the private names that it reads or sets on `self`."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    names = {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            if not only_set or isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_python(kind):
    """Return whether a class is written in Python. The others have no source to read."""
    return not kind.__module__.startswith("torch._C")


def shared_with_upstream(kind):
    """Return the private names of a class that a base class from another package has, too."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith(UPSTREAM) and is_python(base)]
    upstream = set().union(*(names_of_self(base, only_set=True) for base in bases))
    documented = {name.split(".")[-1] for name in DOCUMENTED}
    return names_of_self(kind) & upstream - documented


@pytest.mark.parametrize("name", FILES)
def test_no_private_name_of_another_object(name):
    tree = ast.parse((ROOT / name).read_text())
    found = [use for use in private_names_of_others(tree) if use.split(": ")[1] not in DOCUMENTED]
    assert not found, f"{name}: {found}. Put what needs it into gdetkd/_compat."


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_of_a_base_class(name):
    module = importlib.import_module(name)
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == name]
    shared = {kind.__name__: names for kind in kinds if (names := shared_with_upstream(kind))}
    assert not shared, f"{name}: {shared}. Rename them, or put what needs them into gdetkd/_compat."


@pytest.mark.parametrize(
    "text, found",
    [
        ("hook._do_eval()\nself._mine", "hook._do_eval"),
        ("self.trainer._trainer", "self.trainer._trainer"),
        ("super()._load_file(f)", "super()._load_file"),
        ("getattr(np, '_core', None) and getattr(self, '_mine') and getattr(np, name)", "getattr(np, '_core', None)"),
        ("import torch._C", ".torch._C"),
        ("from torch._utils import name", "torch._utils.name"),
        ("from ..files import written_whole, _folder", "files._folder"),
        ("from ._compat.imports import x\nfrom .. import __version__\nimport numpy", None),
    ],
)
def test_each_kind_of_use_is_found(text, found):
    assert list(private_names_of_others(ast.parse(text))) == ([f"line 1: {found}"] if found else [])


def test_names_of_a_base_class_are_found():
    from detectron2.engine.hooks import BestCheckpointer

    assert {"_period", "_best_checking"} <= names_of_self(BestCheckpointer, only_set=True)


def test_each_workaround_names_its_versions():
    """A reader has to see when it can go."""
    lacking = []
    for info in pkgutil.iter_modules(gdetkd._compat.__path__):
        module = importlib.import_module(f"gdetkd._compat.{info.name}")
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", "") == module.__name__ and not is_private(name)
            texts = f"{module.__doc__} {inspect.getdoc(value)}"
            if is_own and not re.search(r"v0\.6|\bmain\b|up to \d", texts):
                lacking.append(name)
    assert not lacking
