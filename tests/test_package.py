"""What holds the package together: floors, exports, docstrings that name real things."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import streammap

PACKAGE = Path(streammap.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever it does."""
    found = set()
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("streammap"):
            base = node.module.removeprefix("streammap").lstrip(".")
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name for name in names if name in known} or {base}
    return found - {""}


def imports() -> dict[str, set[str]]:
    return {name: imported(path) - {name} for name, path in modules().items()}


def cycle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle; empty where imports point down only."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def reached(found: dict[str, set[str]], start: str) -> set[str]:
    """All modules that one needs, its own imports' imports too."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = found.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def test_imports_point_down() -> None:
    assert cycle(imports()) == []


def test_a_circle_of_imports_is_found() -> None:
    found = imports()
    found["errors"] = {"api"}
    assert {"errors", "api"} <= set(cycle(found))


def test_the_ground_floor_needs_nothing() -> None:
    found = imports()
    for name in (
        "errors",
        "common.events",
        "planning.segments",
        "common.version",
    ):
        assert found[name] == set()


def test_places_for_bytes_know_nothing_of_plans() -> None:
    found = imports()
    for name in (name for name in found if name.startswith("io.storage.")):
        assert reached(found, name).isdisjoint(
            {"planning.plan", "planning.graph", "engine.schedule", "architectures.model", "api"}
        )


def test_nothing_needs_the_command_line() -> None:
    fronts = {name for name in modules() if name.startswith("cli.")} | {"__main__"}
    for name, others in imports().items():
        assert name in fronts or others.isdisjoint(fronts), name


def test_exports_are_sorted_and_there() -> None:
    assert streammap.__all__ == sorted(streammap.__all__)
    for name in streammap.__all__:
        assert getattr(streammap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        streammap.__getattr__("nothing")


@pytest.mark.parametrize("name", sorted(modules()))
def test_modules_say_what_they_are(name: str) -> None:
    if name != "__main__":
        assert importlib.import_module(f"streammap.{name}").__doc__
