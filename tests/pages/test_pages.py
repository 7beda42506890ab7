"""Every block of every page runs as it is printed: in order, in a fresh folder."""

import re
import shlex
from pathlib import Path

import pytest

from tests.pages import stand_ins
from tests.pages.reader import PAGES, ROOT, Block, blocks, commands
from tests.pages.session import Session, alike, pattern
from tests.support import typed

NOT_RUN = {
    ("README.md", "make "): "sets up an environment; tests/tools/test_demo.py runs the demo",
    ("README.md", "pip install"): "the packages are here",
    ("README.md", "streammap testbench"): "minutes; run with -m slow",
    ("docs/clusters.md", "torchrun --nnodes 4"): "four machines; the line before runs on one",
    ("docs/clusters.md", "#!/bin/bash"): "SLURM; tests/output/test_ranks.py sets its variables",
    ("docs/package.md", "pip install"): "the packages are here",
    ("docs/security.md", "pip install"): "atheris is no part of the tests",
    ("docs/security.md", "python -m tests.fuzz"): "tests/test_fuzz.py replays the corpus",
}
"""(Page, first words of a command or script) -> why it is not run."""
LANGUAGES = {"console", "python", "bash"}
"""What is run. Other blocks are content of files, where they have a name, or show a form."""


LONG = (
    "docs/blending.md",
    "docs/object-stores.md",
    "docs/lora.md",
    "docs/quantised.md",
    "docs/merge-methods.md",
    "docs/original.md",
    "docs/launchers.md",
    "docs/optimizer.md",
    "schemes/README.md",
    "docs/growing.md",
    "docs/recipes.md",
)
"""Pages of many commands, each of which starts Python and torch anew: slow tests."""
PROJECT_PAGE = "docs/package.md"
"""The long description of the distribution, which readers of the source need not see."""
RECIPES = "CONTRIBUTING.md"
"""Followed in test_contributing.py, in a copy of the source; it has a command that we lack."""


def reason_not_to_run(block: Block, text: str) -> str | None:
    for (page, words), reason in NOT_RUN.items():
        if block.page == page and text.startswith(words):
            return reason
    return None


def left_out(block: Block) -> list[str]:
    """Commands and scripts of a block that are on the list."""
    texts = [c.line for c in commands(block)] if block.language == "console" else [block.text]
    return [text for text in texts if reason_not_to_run(block, text)]


def pages() -> list[object]:
    return [
        pytest.param(page, marks=pytest.mark.slow if page in LONG else ())
        for page in PAGES
        if page != RECIPES
    ]


@pytest.mark.parametrize("page", pages())
def test_the_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    stand_in = stand_ins.OF_PAGE.get(page, stand_ins.nothing)
    with (
        stand_in(tmp_path) as environment,
        Session(tmp_path / "fresh", environment, installed=page == "README.md") as session,
    ):
        for block in blocks(page):
            if block.file or (block.language in LANGUAGES and not left_out(block)):
                session.run(block)
            elif block.language == "console":
                for command in commands(block):
                    if not reason_not_to_run(block, command.line):
                        session.run_command(block, command)


@pytest.mark.slow
def test_the_testbench_prints_what_the_readme_says(tmp_path: Path) -> None:
    with Session(tmp_path / "fresh", {}) as session:
        for block in blocks("README.md"):
            for command in commands(block) if block.language == "console" else ():
                if command.line == "streammap testbench":
                    session.run_command(block, command)


def test_the_list_of_what_is_not_run_is_current() -> None:
    texts = {
        (block.page, text) for page in PAGES for block in blocks(page) for text in left_out(block)
    }
    for page, words in NOT_RUN:
        assert any(p == page and text.startswith(words) for p, text in texts), (page, words)


def streammap_lines() -> list[str]:
    """Each streammap command of the pages, those that are not run too."""
    texts: list[str] = []
    for page in set(PAGES) - {RECIPES}:
        for block in blocks(page):
            if block.language == "console":
                texts += [command.line for command in commands(block)]
            elif block.language == "bash":
                texts.append(block.text)
    joined = "\n".join(texts).replace("\\\n", " ")
    return sorted(set(re.findall(r"^(?:.*-m )?(streammap .*)$", joined, re.MULTILINE)))


@pytest.mark.parametrize("line", streammap_lines())
def test_each_command_is_one(line: str) -> None:
    _, *words = shlex.split(re.split(r" [|<>] ", line)[0], comments=True)
    command, rest = typed.command(*words)
    command.make_context(str(command.name), rest)


def test_the_readme_is_short_and_says_what_people_search_for() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    words = "function-preserving grow widen deepen expand upscal shrink prune"
    for word in words.split():
        assert word in text.lower(), word


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, "bench/README.md", "streammap/architectures/README.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_all_pages_are_on_the_list_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in set(PAGES) - {"README.md", PROJECT_PAGE}:
        assert f"]({page})" in text, page


def test_all_shipped_schemes_are_on_their_page() -> None:
    page = (ROOT / "schemes" / "README.md").read_text()
    for path in (ROOT / "schemes").glob("*.json"):
        assert f"`{path.name}`" in page


@pytest.mark.parametrize(
    ("output", "matches"),
    [
        ("one\nwrote 3 MB in 0.1 s (30 MB/s)\nend", True),
        ("one\nwrote 3 MB in 2.9 s (1 MB/s)\nmore\nend", False),
        ("one\nwrote 4 MB in 0.1 s (30 MB/s)\nend", False),
        ("one\nwrote 3 MB in 0.1 s (30 MB/s)", False),
    ],
)
def test_output_is_held_to_what_is_printed(output: str, matches: bool) -> None:
    expected = ("one", "wrote 3 MB in 0.5 s (6 MB/s)", "end")
    assert bool(pattern(expected).fullmatch(alike(output))) == matches


def test_dots_stand_for_lines() -> None:
    assert pattern(("a", "...", "c")).fullmatch("a\nb\nb\nc")
    assert pattern(("a", "...", "c")).fullmatch("a\nc")
    assert pattern(("a", "...")).fullmatch("a\nb")
    assert pattern(("a", "...")).fullmatch("a")
    assert not pattern(("a", "...")).fullmatch("ab")
    assert pattern(("...",)).fullmatch("a\nb")
    assert pattern(("a ...", "b")).fullmatch("a much\nb")
    assert not pattern(("a", "...", "c")).fullmatch("b\nc")


def test_a_block_that_fails_is_caught(tmp_path: Path) -> None:
    with Session(tmp_path / "fresh", {}) as session:
        session.run(Block("x.md", 1, "python", "", "x = 1"))
        session.run(Block("x.md", 2, "python", "", "assert x == 1"))
        session.run(Block("x.md", 3, "console", "", "$ echo a; echo b\na\nb\n"))
        for block in (
            Block("x.md", 4, "python", "", "assert x == 2"),
            Block("x.md", 5, "console", "", "$ echo a\nb\n"),
            Block("x.md", 6, "console", "", "$ false\n"),
            Block("x.md", 7, "console", "", "$ exit 2\n...\n"),
        ):
            with pytest.raises(AssertionError, match=rf"x\.md:{block.line}"):
                session.run(block)
