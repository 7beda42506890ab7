"""What holds the package together: floors, exports, docstrings that name real things."""

import ast
import importlib
from pathlib import Path

import pytest

import streammap

PACKAGE = Path(streammap.__file__).parent
FLOORS = (
    (
        "digests",
        "checksums",
        "errors",
        "events",
        "inference.configchanges",
        "segments",
        "spec",
        "storage.disk",
        "strictjson",
        "tally",
        "version",
    ),
    (
        "configfields",
        "dtypes",
        "expression",
        "maps",
        "optional",
        "pickles",
        "progress",
        "quantized",
        "ranks",
        "reading",
        "requests",
        "tomlvalues",
        "workfolder",
    ),
    (
        "buffers",
        "graph",
        "header",
        "headmaps",
        "journal",
        "pattern",
        "pullback",
        "storage.local",
        "tiling",
        "tinymodels",
        "validation",
    ),
    (
        "architecture",
        "inference.probing",
        "launch",
        "layout",
        "recipe",
        "torchfile",
    ),
    (
        "checkpoint",
        "commit",
        "engine",
        "memory",
        "output",
        "program",
    ),
    (
        "clioptions",
        "compiler",
        "devices",
        "dimmaps",
        "inference.anatomy",
        "kernels",
        "layers",
        "mapfile",
        "scheme",
        "sizes",
        "specpart",
        "survey",
    ),
    (
        "inference.solving",
        "lineage",
        "schedule",
        "specfile",
    ),
    (
        "catalogue",
        "inference.meanings",
        "worker",
        "writer",
    ),
    (
        "evaluate",
        "inference.spectext",
        "listing",
        "model",
        "pipeline",
    ),
    (
        "axisfacts",
        "inference.spectables",
        "plan",
        "rewriting",
        "streams",
    ),
    (
        "axisrequests",
        "identity",
        "health",
        "inference.shrinking",
        "operators.interpolate",
        "remapping",
        "rereading",
        "sidefiles",
    ),
    (
        "inference.infer",
        "planner",
        "record",
        "spaces",
    ),
    (
        "compensation",
        "making",
        "operators.permute",
    ),
    (
        "executor",
        "headsize",
    ),
    ("promises",),
    (
        "operators.resize",
        "summary",
    ),
    ("options",),
    ("resizejson",),
    ("recorded",),
    ("api",),
    (
        "inspection",
        "mapper",
        "proof",
        "replay",
        "testbench",
    ),
    (
        "clispec",
        "demo",
        "verification",
    ),
    ("cliverify",),
    ("cli",),
    ("__main__",),
)
"""Each module imports from floors above its own in this list only."""


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


def wrong_imports(floors: tuple[tuple[str, ...], ...]) -> list[str]:
    floor = {name: i for i, names in enumerate(floors) for name in names}
    return [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if other in floor and floor[other] >= floor[name] and other != name
    ]


def test_each_module_has_a_floor() -> None:
    assert {name for names in FLOORS for name in names} == modules().keys()


def test_imports_point_down() -> None:
    assert wrong_imports(FLOORS) == []


def test_an_import_that_points_up_is_found() -> None:
    assert wrong_imports(FLOORS[::-1])


def test_exports_are_sorted_and_there() -> None:
    assert streammap.__all__ == sorted(streammap.__all__)
    for name in streammap.__all__:
        assert getattr(streammap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        streammap.__getattr__("nothing")


@pytest.mark.parametrize("name", sorted(modules()))
def test_modules_stay_small(name: str) -> None:
    assert len(modules()[name].read_text().splitlines()) <= 460
    if name != "__main__":
        assert importlib.import_module(f"streammap.{name}").__doc__
