"""The packages, and the one direction in which they import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "alexnet_jax"
# Each room imports from itself and from those before it.
ROOMS = ("system", "data", "models", "training", "analysis", "sweeps", "commands")
COMMANDS = {"__init__", "main", "prepare", "predict", "retrieve", "report", "export"}


def room_of(module: str) -> str:
    """Return the room of a dotted name such as "data.loader" or "main"."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "commands"


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        inside = (name.split(".", 1) for name in names if "." in name)
        found |= {rest for package, rest in inside if package == ROOT.name}
    return found


def test_root_holds_the_rooms_and_the_commands():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"commands"}
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.stem != "__init__" or path.parent != ROOT
        if room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) == room
        for name in sorted(imports(path))
        if ROOMS.index(room_of(name)) > ROOMS.index(room)
    ]
    assert not upward
