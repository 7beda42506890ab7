"""The page on the architecture names what is there."""

import re

from streammap.architectures import registry
from tests import test_package
from tests.pages.reader import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_its_order_of_packages_is_the_contracts() -> None:
    assert f"    {' > '.join(test_package.ORDER[1:])}\n" in TEXT


def test_the_modules_that_it_names_are_there() -> None:
    """Those of a line are in the package of its first."""
    package = ROOT / "streammap"
    n = 0
    for line in TEXT.splitlines():
        names = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:/|\.py))(?::(\w+))?`", line)
        for name, member in names:
            inside = package / names[0][0].partition("/")[0] / name
            path = next((p for p in (package / name, inside, ROOT / name) if p.exists()), None)
            assert path is not None, f"{name}: {line}"
            assert not member or f"class {member}" in path.read_text()
            n += 1
    assert n > 40


def test_all_packages_are_in_its_table() -> None:
    entries = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "streammap").iterdir()
        if not path.name.startswith(("_", ".")) and path.name != "py.typed"
    }
    for entry in entries:
        assert re.search(rf"^\|.*`{re.escape(entry)}`.*\|", TEXT, re.MULTILINE), entry


def test_the_example_is_a_rule_of_the_spec() -> None:
    spec = registry.load("llama", {"model_type": "llama"})
    assert any("mlp.down_proj" in rule.pattern.text for rule in spec.rules)


def test_the_glossary_is_short() -> None:
    words = re.findall(
        r"^\| ([a-z-]+(?:,? [a-z]+)*) \| [a-z`]", TEXT.split("## Words")[1], re.MULTILINE
    )
    assert 22 <= len(words) <= 30, words
