"""The pages of the project, and the blocks that they print."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "schemes/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    """Of its first line, counted from 1."""
    language: str
    file: str
    """The name after the language, of a block that is the content of a file; else empty."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """A line to type, and what the page says that it prints."""

    line: str
    output: tuple[str, ...]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that name a language, in order."""
    text = (ROOT / page).read_text()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        yield Block(page, line, match[1], match[2] or "", match[3])


def commands(block: Block) -> Iterator[Command]:
    """Each `$ line` of a console block, with its continuation lines and its output."""
    assert block.text.startswith("$ "), block
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.rstrip("\n").split("\n")
        n = 1
        while lines[n - 1].endswith("\\"):
            n += 1
        yield Command("\n".join(lines[:n]), tuple(lines[n:]))
