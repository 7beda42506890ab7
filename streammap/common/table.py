"""Tables and labelled lines as text: they fit the terminal, and stay whole where they are piped.

    tensor                   number  shape                     guarantee
    encoder.layer.*.         6 -> 3  [384, 1536] -> [192,      approximate
    output.dense.weight              768]

Cells are other people's text (keys, paths): what a terminal would obey is escaped here, before
colours are put in.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from streammap.errors import printable

Colour = Literal["red", "green", "yellow", "bold", "faint"]
_CODES: Mapping[Colour, str] = {
    "red": "31",
    "green": "32",
    "yellow": "33",
    "bold": "1",
    "faint": "2",
}
_GAP = "  "
_LEAST = 12
"""No column is made narrower than this; a table that needs more stands over the edge."""
_PIECE = re.compile(r"[^\s._/,:]*(?:[._/,:]|\s+)|[^\s._/,:]+")
"""Lines break after these letters: keys and paths have no spaces."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    title: str
    align: Literal["left", "right"] = "left"
    wraps: bool = False
    """Whether its cells may take several lines; numbers should not."""
    can_go: bool = False
    """Whether it is left out where the terminal is too narrow for whole lines."""
    colours: Mapping[str, Colour] | None = None
    """Text of a cell -> its colour."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: a row of titles, then the rows."""
    room = _room()
    cells = [[printable(cell) for cell in row] for row in ([c.title for c in columns], *rows)]
    widths = [max(map(len, texts)) for texts in zip(*cells, strict=True)]
    if room is not None and _width(widths) > room:
        kept = [i for i, column in enumerate(columns) if not column.can_go]
        columns, widths = [columns[i] for i in kept], [widths[i] for i in kept]
        cells = [[row[i] for i in kept] for row in cells]
        widths = _fitted(widths, [column.wraps for column in columns], room)
    lines: list[str] = []
    for i, row in enumerate(cells):
        lines += _row(columns, row, widths, is_title=i == 0)
    return lines


def fields(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a label and a text each; the texts begin in one column."""
    known = [(label, printable(text)) for label, text in pairs]
    indent = max((len(label) for label, _ in known), default=0) + len(_GAP)
    room = _room()
    lines = []
    for label, text in known:
        first, *rest = _wrapped(text, max(room - indent, 2 * _LEAST) if room else None)
        lines.append(f"{label:<{indent}}{first}".rstrip())
        lines += [" " * indent + line for line in rest]
    return lines


def coloured(text: str, colour: Colour | None) -> str:
    """The text in a colour, where stdout is a terminal that has some."""
    if colour is None or not _has_colour():
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def _room() -> int | None:
    """Columns of the terminal; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _has_colour() -> bool:
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _fitted(natural: Sequence[int], wraps: Sequence[bool], room: int) -> list[int]:
    """Widths of the columns: the widest that wraps gives way first."""
    widths = list(natural)
    while _width(widths) > room:
        widest = max(
            (i for i, can in enumerate(wraps) if can and widths[i] > _LEAST),
            key=lambda i: widths[i],
            default=None,
        )
        if widest is None:
            break
        widths[widest] -= 1
    return widths


def _row(
    columns: Sequence[Column], row: Sequence[str], widths: Sequence[int], *, is_title: bool
) -> Iterator[str]:
    wrapped = [
        _wrapped(cell, width if column.wraps else None)
        for column, cell, width in zip(columns, row, widths, strict=True)
    ]
    for i in range(max(map(len, wrapped))):
        parts = []
        for column, cell, lines, width in zip(columns, row, wrapped, widths, strict=True):
            text = lines[i] if i < len(lines) else ""
            padded = f"{text:<{width}}" if column.align == "left" else f"{text:>{width}}"
            colour = "bold" if is_title else (column.colours or {}).get(cell)
            parts.append(padded.replace(text, coloured(text, colour), 1) if text else padded)
        yield _GAP.join(parts).rstrip()


def _wrapped(text: str, width: int | None) -> list[str]:
    """The text in lines of at most `width` letters, broken where words or names of a key end."""
    if width is None or len(text) <= width:
        return [text]
    lines = [""]
    for piece in _PIECE.findall(text):
        if len(lines[-1]) + len(piece.rstrip()) > width and lines[-1]:
            lines.append("")
        rest = piece if lines[-1] else piece.lstrip()
        while len(rest.rstrip()) > width:
            lines[-1], rest = rest[:width], rest[width:]
            lines.append("")
        lines[-1] += rest
    return [line.rstrip() for line in lines]
