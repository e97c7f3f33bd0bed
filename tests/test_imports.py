"""The house: imports run downward, in the order in which docs/design.md names the rooms; files stay short."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "lora_cli"
LONGEST = 400  # lines
OUTSIDE = ("benchmarks", "scripts", "tests")  # they may import the package, and it none of them


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported_by(path: Path) -> list[str]:
    """Every module that a file names in an import, also inside functions."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [each if each in MODULES else node.module for each in inner]
    return found


def house() -> list[str]:
    """Rooms and files of the package, from the top down, as docs/design.md draws them."""
    drawn = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## The house")[1].split("```")[1]
    first = {name: at for at, name in reversed(list(enumerate(re.findall(r"[\w/]+", drawn))))}
    names = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = [name for name in names if name not in ("__init__", "__main__")]
    written = {name: f"{name}/" if (PACKAGE / name).is_dir() else name for name in rooms}
    missing = [name for name in rooms if written[name] not in first and name not in first]
    assert not missing, f"docs/design.md does not name {missing}"
    return sorted(rooms, key=lambda name: first.get(written[name], first.get(name, 0)))


def test_imports_run_downward() -> None:
    order = {name: at for at, name in enumerate(house())} | {"__main__": -1}
    upward = []
    for module, path in MODULES.items():
        for name in imported_by(path):
            room, other = (f"{each}.".split(".")[1] for each in (module, name))
            if name.startswith("lora_cli.") and room and other != room and order[other] < order[room]:
                upward.append(f"{module} imports {name}, which is above it in docs/design.md")
    assert upward == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {each for each in imported_by(path) if each in MODULES} for name, path in MODULES.items()}
    for name, imported in graph.items():
        # `from lora_cli.room import thing` runs the room's __init__, which may import its own modules
        graph[name] = {each for each in imported if not name.startswith(f"{each}.")}
    circle: list[str] = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        circle = found.args[1]
    assert not circle, " → ".join(circle)


def test_the_package_imports_nothing_of_benchmarks_scripts_and_tests() -> None:
    outside = {path.stem for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py")} | set(OUTSIDE)
    for name, path in MODULES.items():
        assert not {each.split(".")[0] for each in imported_by(path)} & (outside - {"__init__", "run"}), name


def test_benchmarks_and_scripts_import_what_exists() -> None:
    for folder in ("benchmarks", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            for name in imported_by(path):
                if name.startswith("lora_cli"):
                    assert name in MODULES, f"{path.name} imports {name}"


def test_files_are_short() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: many for module, many in lines.items() if many > LONGEST} == {}
