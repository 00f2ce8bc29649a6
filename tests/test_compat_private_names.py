"""The upper floors touch no private name of Detectron2, fvcore or torch: `gdetkd._compat` does."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import gdetkd.engine
import gdetkd.insight
import gdetkd.study

PACKAGES = (gdetkd.engine, gdetkd.insight, gdetkd.study)
MODULES = sorted(
    module.name for package in PACKAGES for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
)
UPSTREAM = ("detectron2.", "fvcore.", "torch.", "pycocotools.")


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_of_others(tree):
    """Yield each `object._name` whose object is not `self` or `cls`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def names_of_self(source, only_set=False):
    """Return the private methods that a class defines, and the private names that it reads or sets on `self`."""
    (definition,) = ast.parse(textwrap.dedent(source)).body
    names = {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            if not only_set or isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def shared_with_upstream(kind):
    """Return the private names of a class that a base class from another package has, too."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith(UPSTREAM)]
    upstream = set().union(*(names_of_self(inspect.getsource(base), only_set=True) for base in bases))
    return names_of_self(inspect.getsource(kind)) & upstream


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_of_another_object(name):
    tree = ast.parse(inspect.getsource(importlib.import_module(name)))
    found = list(private_names_of_others(tree))
    assert not found, f"{name}: {found}. Put what needs it into gdetkd/_compat."
    # Names of modules are private attributes, too.
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [alias for alias in imported if is_private(alias)]


@pytest.mark.parametrize("name", MODULES)
def test_no_private_name_of_a_base_class(name):
    module = importlib.import_module(name)
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
    shared = {kind.__name__: names for kind in kinds if (names := shared_with_upstream(kind))}
    assert not shared, f"{name}: {shared}. Rename them, or put what needs them into gdetkd/_compat."


def test_both_kinds_of_access_are_found():
    from detectron2.engine.hooks import BestCheckpointer

    assert list(private_names_of_others(ast.parse("hook._do_eval()\nself._mine"))) == ["line 1: hook._do_eval"]
    assert {"_period", "_best_checking"} <= names_of_self(inspect.getsource(BestCheckpointer), only_set=True)


def test_each_workaround_names_its_versions():
    """A reader has to see when it can go."""
    import gdetkd._compat

    lacking = []
    for info in pkgutil.iter_modules(gdetkd._compat.__path__):
        module = importlib.import_module(f"gdetkd._compat.{info.name}")
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", "") == module.__name__ and not is_private(name)
            texts = f"{module.__doc__} {inspect.getdoc(value)}"
            if is_own and not re.search(r"v0\.6|\bmain\b|up to \d", texts):
                lacking.append(name)
    assert not lacking
