"""The contract between packages, and what the top level exports.

The source text is read, so that an import inside a function, under TYPE_CHECKING or by a string
(`import_module("streammap.x")`, `-m streammap.x`) counts like any other.
"""

import ast
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import streammap

PACKAGE = Path(streammap.__file__).parent
ORDER = (
    *("streammap", "cli", "trainer", "tools", "one_call", "api", "analysis", "output", "engine"),
    *("operators", "planning", "architectures", "io", "progress", "common", "errors"),
)
"""Each may import what stands to its right. `streammap` is the top level's own __init__.py."""
TESTING = {"testing", "io", "common", "errors"}
"""What the test kit may import; nothing imports the test kit."""
PLANNERS = ("api", "one_call", "cli.main", "analysis.summary")
"""What makes and prints a plan, and so must not wait seconds for torch."""
MAX_MODULES = 20
MAX_ENTRIES, MAX_LINES = 16, 500


@dataclass(slots=True)
class Source:
    """What one module imports and reaches into."""

    imports: set[str] = field(default_factory=set)
    """Modules of the package."""
    at_start: set[str] = field(default_factory=set)
    """What importing this module imports: modules of the package, and "torch"."""
    private: set[str] = field(default_factory=set)
    """Names with a leading underscore that it takes from other packages."""


def read_package(root: Path) -> dict[str, Source]:
    """Module, such as "io.checkpoint" or "io" -> what it imports."""
    paths = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        paths[name or "streammap"] = path
    return {name: Reader(name, paths.keys()).read(path) for name, path in paths.items()}


class Reader(ast.NodeVisitor):
    def __init__(self, name: str, known: Set[str]) -> None:
        self.name, self.known, self.source = name, known, Source()
        self.is_lazy = False
        self.locals: dict[str, str] = {}

    def read(self, path: Path) -> Source:
        self.visit(ast.parse(path.read_text()))
        return self.source

    def add(self, dotted: str, alias: str | None = None) -> None:
        """Note an import of `streammap.x.y`, where y is a module or a name in one."""
        module, _, last = dotted.removeprefix("streammap").lstrip(".").rpartition(".")
        whole = f"{module}.{last}".lstrip(".")
        target = whole if whole in self.known else module or "streammap"
        self.source.imports.add(target)
        if not self.is_lazy:
            self.source.at_start |= {target, target.partition(".")[0]}
        if last.startswith("_") and last.strip("_") == last[1:]:
            self.take(target, last)
        if target == whole:
            self.locals[alias or last] = target

    def take(self, module: str, name: str) -> None:
        if floor(module) != floor(self.name):
            self.source.private.add(f"{module}.{name}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add_any(alias.name, alias.asname)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.name}: imports are absolute"
        for alias in node.names:
            self.add_any(f"{node.module}.{alias.name}", alias.asname)

    def add_any(self, dotted: str, alias: str | None) -> None:
        top = dotted.partition(".")[0]
        if top == "streammap":
            self.add(dotted, alias)
        elif top == "torch" and not self.is_lazy:
            self.source.at_start.add("torch")

    def visit_Constant(self, node: ast.Constant) -> None:
        text = node.value if isinstance(node.value, str) else ""
        if text.startswith("streammap.") and text.removeprefix("streammap.") in self.known:
            self.source.imports.add(text.removeprefix("streammap."))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            module = self.locals.get(node.value.id)
            if module is not None and not node.attr.startswith("__"):
                self.take(module, node.attr)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        was, self.is_lazy = self.is_lazy, True
        self.generic_visit(node)
        self.is_lazy = was

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 (the name that ast looks for)

    def visit_If(self, node: ast.If) -> None:
        was = self.is_lazy
        self.is_lazy = was or ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body:
            self.visit(child)
        self.is_lazy = was
        for child in node.orelse:
            self.visit(child)


def floor(module: str) -> str:
    top = module.partition(".")[0]
    return "streammap" if top == "__main__" else top


def violations(package: Mapping[str, Source]) -> set[str]:
    """Imports that point the wrong way, as "module -> module"."""
    return {
        f"{name} -> {other}"
        for name, source in package.items()
        for other in source.imports
        if not may_import(floor(name), floor(other))
    }


def may_import(one: str, other: str) -> bool:
    if one == "testing":
        return other in TESTING
    return other in ORDER and ORDER.index(one) <= ORDER.index(other)


def cycle(package: Mapping[str, Source]) -> list[str]:
    """Modules that import one another in a circle; empty where there is none."""
    try:
        TopologicalSorter({k: v.imports - {k} for k, v in package.items()}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def imported_at_start(package: Mapping[str, Source], name: str) -> set[str]:
    """All that importing a module imports."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = package.get(waiting.pop(), Source()).at_start - seen
        seen |= new
        waiting += new
    return seen


def crowded(root: Path) -> Iterator[str]:
    """Folders with more modules than a newcomer can take in."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        n = sum(path.suffix == ".py" and path.stem != "__init__" for path in folder.iterdir())
        if n > MAX_MODULES:
            yield f"{folder.relative_to(root)}: {n} modules"


@pytest.fixture(scope="module")
def package() -> dict[str, Source]:
    return read_package(PACKAGE)


def test_packages_import_to_their_right_only(package: dict[str, Source]) -> None:
    assert {floor(name) for name in package} == {*ORDER, "testing"}
    assert violations(package) == set()


def test_no_modules_import_one_another(package: dict[str, Source]) -> None:
    assert cycle(package) == []


def test_private_names_stay_in_their_package(package: dict[str, Source]) -> None:
    assert {name: source.private for name, source in package.items() if source.private} == {}


def test_a_plan_needs_no_torch(package: dict[str, Source]) -> None:
    for name in PLANNERS:
        assert "torch" not in imported_at_start(package, name), name
    for name, source in package.items():
        assert floor(name) != "planning" or "torch" not in source.at_start, name


def test_folders_can_be_taken_in_at_a_glance() -> None:
    assert list(crowded(PACKAGE)) == []
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", "."))}
    assert len(entries - {"py.typed"}) <= MAX_ENTRIES, sorted(entries)
    assert "operators" in entries


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lengths) > 100
    assert [str(path) for path, n in lengths.items() if n > MAX_LINES] == []


OFFENDERS = {
    "io.offender": "def f():\n    from streammap.api import open\n",
    "errors": "if TYPE_CHECKING:\n    import streammap.common.text\n",
    "planning.offender": "run('-m', 'streammap.cli.main')\n",
    "common.offender": "from streammap import api\n",
    "engine.offender": "import_module('streammap.tools.demo')\n",
    "testing.offender": "from streammap.planning import maps\n",
    "output.offender": "from streammap.testing import faults\n",
}


def test_each_way_to_import_upwards_is_caught(tmp_path: Path) -> None:
    for name in ("common.text", "cli.main", "tools.demo", "planning.maps", "testing.faults", "api"):
        write(tmp_path, name, "")
    for name, text in OFFENDERS.items():
        write(tmp_path, name, text)
    assert violations(read_package(tmp_path)) == {
        "io.offender -> api",
        "errors -> common.text",
        "planning.offender -> cli.main",
        "common.offender -> api",
        "engine.offender -> tools.demo",
        "testing.offender -> planning.maps",
        "output.offender -> testing.faults",
    }


def test_circles_private_names_and_early_torch_are_caught(tmp_path: Path) -> None:
    write(tmp_path, "io.a", "from streammap.io import b")
    write(tmp_path, "io.b", "def f():\n    from streammap.io.a import g, _h\n")
    write(tmp_path, "planning.a", "from streammap.io.b import _c\nfrom streammap.io import a")
    write(tmp_path, "planning.b", "from streammap.io import a\na._hidden()\na.__doc__")
    write(tmp_path, "api", "from streammap.planning import c")
    write(tmp_path, "planning.c", "from streammap.planning import d")
    write(tmp_path, "planning.d", "from torch import Tensor")
    write(tmp_path, "planning.e", "def f():\n    import torch\nif TYPE_CHECKING:\n    import torch")
    package = read_package(tmp_path)
    assert {"io.a", "io.b"} <= set(cycle(package))
    assert package["planning.a"].private == {"io.b._c"}
    assert package["planning.b"].private == {"io.a._hidden"}
    assert package["io.b"].private == set()
    assert "torch" in imported_at_start(package, "api")
    assert "torch" not in imported_at_start(package, "planning.e")


def test_a_crowded_folder_is_caught(tmp_path: Path) -> None:
    for i in range(MAX_MODULES + 1):
        write(tmp_path, f"io.m{i}", "")
    assert list(crowded(tmp_path)) == ["io: 21 modules"]


def write(root: Path, name: str, text: str) -> None:
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_exports_are_sorted_and_there() -> None:
    assert streammap.__all__ == sorted(streammap.__all__)
    for name in streammap.__all__:
        assert getattr(streammap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        streammap.__getattr__("nothing")


def test_modules_say_what_they_are() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or path.name == "__main__.py", path
