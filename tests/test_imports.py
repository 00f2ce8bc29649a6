"""The package has floors. No file imports a file of a higher floor, and no files import each other in a circle.

A room is a file or folder of the package.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "projects" / "GDetKD" / "gdetkd"
# The floors from the ground up. A file may import from the floors below its own, and from its own floor.
FLOORS = (
    (
        "_compat",
        "device",
        "errors",
        "files",
        "matching",
        "metrics_file",
        "program",
        "random_state",
        "recorder",
        "roi_align",
        "roi_align_cpu",
        "structures",
        "user_modules",
    ),
    ("figures", "inference", "mixture", "regions", "safe_load", "weights_layout"),
    ("backbones", "detectors", "losses"),
    ("config", "config_file", "config_places", "detector_config", "dotted_keys", "trained_with"),
    ("data",),
    ("mmdetection", "teacher"),
    ("distiller",),
    ("engine",),
    ("insight", "labelling"),
    ("study", "gdetkd"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Applications beside each other: none may import another.
APPLICATIONS = {"insight", "labelling"}
# Rooms that may import only these rooms of the package.
ALONE = {
    "figures": set(),
    "backbones": {"errors", "safe_load", "weights_layout"},
    "losses": {"errors", "roi_align", "structures"},
    "detectors": {"_compat", "device", "errors", "recorder", "regions", "roi_align", "structures"},
}


def module_of(path):
    parts = ("gdetkd", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(module):
    """Return the modules of the package that a module imports, also inside of its functions."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
                found |= {name} & set(MODULES)
    return found - {module}


GRAPH = {module: imports_of(module) for module in MODULES}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upward(module):
    room = room_of(module)
    upward = [name for name in GRAPH[module] if FLOOR[room_of(name)] > FLOOR[room]]
    assert not upward, f"{module} imports {upward}, which are on a higher floor"
    if room in APPLICATIONS:
        assert not {room_of(name) for name in GRAPH[module]} & APPLICATIONS - {room}, f"{module} imports a sibling"
    allowed = ALONE.get(room)
    if allowed is not None:
        others = {room_of(name) for name in GRAPH[module]} - allowed - {room}
        assert not others, f"{module} imports {sorted(others)}, but {room} may import only {sorted(allowed)}"


def test_no_circle():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"Imports form a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for name in sorted(GRAPH[module]):
            visit(name)
        path.pop()
        done.add(module)

    for module in sorted(MODULES):
        visit(module)


def test_the_entry_points_are_thin():
    root = PACKAGE.parents[2]
    assert len((root / "train_net.py").read_text().splitlines()) < 100
