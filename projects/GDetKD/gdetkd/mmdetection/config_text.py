"""Read the values in mmdetection's configs. These are Python programs, but they are parsed and never run."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Set

from ..errors import GDetKDError

# A line that holds only a path. Early 2.x checkpoints keep the texts of several config files, each after such a line.
PATH_LINE = re.compile(r"^[^\s#'\"(=]+\.py$", re.MULTILINE)
ARITHMETIC = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


class _NotPlain(Exception):
    """Report an expression that is more than plain values. The argument is the number of its line."""


@dataclass(frozen=True)
class Unreadable:
    """Hold the place of a value that could be had only by running the config."""

    place: str


def read_config_text(text: str, source: str) -> Dict[str, Any]:
    """Return the values that a config text in a checkpoint assigns, by name. Lists become tuples.

    Args:
        text: a complete config, or the texts of several files, each after a line with its path. In the latter case the
            values are merged in order.
        source: where the text comes from, for messages.

    Raises:
        GDetKDError: the text is not valid Python.
    """
    merged: Dict[str, Any] = {}
    for part in PATH_LINE.split(text):
        values = _values(part, source)
        values.pop("_base_", None)  # the texts of these files come before
        merged = _merge(merged, values)
    return merged


def read_config_file(path: Path, including: Sequence[Path] = ()) -> Dict[str, Any]:
    """Return the values that a config file and its `_base_` files assign, by name. Lists become tuples.

    Args:
        path: the file.
        including: files that are being read, because they name this one as a base.

    Raises:
        GDetKDError: a file is missing, is not valid Python, or is a base of itself.
    """
    if path in including:
        raise GDetKDError(f"The mmdetection config {str(path)!r} includes itself through `_base_`. Correct the file.")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        named_by = f", which {str(including[-1])!r} names in `_base_`," if including else ""
        raise GDetKDError(
            f"The mmdetection config {str(path)!r}{named_by} cannot be read ({e}). Correct the path, or copy "
            "mmdetection's whole configs folder."
        ) from e
    values = _values(text, str(path))
    bases = values.pop("_base_", ())
    bases = (bases,) if isinstance(bases, str) else bases
    if not isinstance(bases, tuple) or not all(isinstance(base, str) for base in bases):
        raise GDetKDError(f"The mmdetection config {str(path)!r} has a `_base_` that is no path and no list of paths.")
    merged: Dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_config_file((path.parent / base).resolve(), (*including, path)))
    return _merge(merged, values)


def _values(text: str, source: str) -> Dict[str, Any]:
    values: Dict[str, Any] = {}
    uses: Dict[str, Set[str]] = {}  # the names from which a name was made
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and all(isinstance(name, ast.Name) for name in statement.targets):
                value, used = _value_or_place(statement.value, values, source), _names_in(statement.value)
                values.update({name.id: value for name in statement.targets})
                uses.update({name.id: used for name in statement.targets})
                continue
            for name in _made_from(_names_changed_by(statement), uses):
                place = f"{source}, line {statement.lineno} changes {name!r} by more than an assignment"
                values[name] = Unreadable(place)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise GDetKDError(
            f"{source} is not valid Python ({type(e).__name__}: {e}), so it cannot be read as an mmdetection config. "
            "Name the detector's config file of mmdetection with --config."
        ) from e
    return values


def _names_in(node: ast.AST) -> Set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _names_changed_by(statement: ast.stmt) -> Set[str]:
    """Return the names whose values a statement may change. It is no assignment of a value to names."""
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return set()
    if isinstance(statement, ast.Assign):
        return set().union(*(_names_in(target) for target in statement.targets))
    if isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
        return _names_in(statement.target)
    return _names_in(statement)


def _made_from(names: Set[str], uses: Mapping[str, Set[str]]) -> Set[str]:
    """Return the names, and all names that were made from them and may share their values."""
    found = set(names)
    while more := {name for name, used in uses.items() if used & found} - found:
        found |= more
    return found


def _value_or_place(node: ast.expr, names: Mapping[str, Any], source: str) -> Any:
    try:
        return _value(node, names)
    except _NotPlain as e:
        return Unreadable(f"{source}, line {e} is more than plain values")


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the value of an expression of plain values, of names with such values, and of `dict(...)`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value
    if isinstance(node, ast.Name) and not isinstance(names.get(node.id, Unreadable("")), Unreadable):
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_value(item, names) for item in node.elts)
    if isinstance(node, ast.Dict):
        keys = [key and _value(key, names) for key in node.keys]
        return _dict(node, keys, [_value(value, names) for value in node.values])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        words = node.keywords
        return _dict(node, [word.arg for word in words], [_value(word.value, names) for word in words])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, names)
        if isinstance(number, (int, float)):
            return -number
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return _calculate(node, _value(node.left, names), _value(node.right, names))
    raise _NotPlain(node.lineno)


def _dict(node: ast.expr, keys: Sequence[Any], values: Sequence[Any]) -> Dict[str, Any]:
    """Make a dictionary. A value without a key is a `**mapping`."""
    made: Dict[str, Any] = {}
    for key, value in zip(keys, values):
        if key is not None and isinstance(key, (str, int)):
            made[str(key)] = value
        elif key is None and isinstance(value, dict):
            made.update(value)
        else:
            raise _NotPlain(node.lineno)
    return made


def _calculate(node: ast.BinOp, left: Any, right: Any) -> Any:
    are_numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    is_joined = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, (str, tuple))
    if not are_numbers and not is_joined:
        raise _NotPlain(node.lineno)
    try:
        return ARITHMETIC[type(node.op)](left, right)
    except ArithmeticError as e:
        raise _NotPlain(node.lineno) from e


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Dict[str, Any]:
    """Lay a config over another one. Dictionaries merge, unless the upper one says `_delete_=True`."""
    merged = dict(below)
    for key, value in above.items():
        if not isinstance(value, dict):
            merged[key] = value
            continue
        lower = {} if value.get("_delete_") else merged.get(key)
        changes = {name: item for name, item in value.items() if name != "_delete_"}
        if not isinstance(lower, Unreadable):  # changes to an unknown value give an unknown value
            merged[key] = _merge(lower if isinstance(lower, dict) else {}, changes)
    return merged
