"""What a wheel says and has: its name is its own, and nothing points to what it lacks."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import streammap
from streammap.cli.main import main

ROOT = Path(__file__).parents[1]
PACKAGE = Path(streammap.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_metadata_is_complete() -> None:
    project = PROJECT["project"]
    assert project["name"] == "streammap-weights"
    assert project["authors"] == [{"name": "streammap contributors"}]
    assert project["classifiers"] == sorted(project["classifiers"])
    assert project["keywords"] == sorted(project["keywords"])
    assert "urls" not in project
    assert "function-preserving" in project["keywords"]


def test_the_long_description_has_no_relative_links() -> None:
    text = (ROOT / PROJECT["project"]["readme"]).read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_all_data_is_named() -> None:
    """What lies in the package and is no module is in the wheel."""
    globs = PROJECT["tool"]["setuptools"]["package-data"]["streammap"]
    shipped = {path for glob in globs for path in PACKAGE.glob(glob)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py"}
    pages = {path for path in others if path.name == "README.md"}
    left = {path for path in others - pages - shipped if "__pycache__" not in path.parts}
    assert left == set()


def test_nobody_is_sent_to_another_projects_package() -> None:
    """`streammap` on PyPI is not this project: no line says to install it, or extras of it."""
    wrong = re.compile(r"pip install[^\n`]*[ '\"]streammap(?!-weights)|streammap\\?\[[a-z]")
    assert wrong.search("pip install 'streammap[s3]'")
    assert wrong.search("pip install -U streammap")
    assert not wrong.search("pip install streammap-weights")
    for path in sorted(set(text_files()) - {Path(__file__)}):
        assert not wrong.search(path.read_text()), path


def text_files() -> Iterator[Path]:
    for folder in ("streammap", "docs", "schemes", "bench", "tests"):
        yield from (p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md", ".toml"))
    yield from ROOT.glob("*.md")


def help_texts() -> dict[str, str]:
    """Command -> its help, of all commands."""
    texts: dict[str, str] = {}
    waiting: list[tuple[str, click.Command]] = [("streammap", main)]
    for path, command in waiting:
        with click.Context(command, info_name=path) as context:
            texts[path] = command.get_help(context)
            if isinstance(command, click.Group):
                for name in command.list_commands(context):
                    inner = command.get_command(context, name)
                    assert inner is not None
                    waiting.append((f"{path} {name}", inner))
    return texts


HELP = help_texts()


@pytest.mark.parametrize("command", HELP)
def test_help_names_what_everybody_has(command: str) -> None:
    text = HELP[command]
    assert "\\" not in text
    assert not re.search(r"\b(docs|schemes|bench|tests)/", text)
