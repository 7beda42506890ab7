"""Tables fit a terminal, stay whole in a pipe, and obey nobody's escape sequences."""

import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.common import table, units
from streammap.common.table import Column

COLUMNS = (
    Column("tensor", wraps=True),
    Column("number", align="right"),
    Column("guarantee", colours={"approximate": "yellow"}),
    Column("formula", wraps=True),
    Column("rule", can_go=True),
)
ROWS = [
    (
        "encoder.layer.*.attention.output.dense.weight",
        "6",
        "approximate",
        "rows: mean of 2",
        "r" * 9,
    ),
    ("pooler.bias", "1", "exact", "copied", ""),
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def plain(line: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", line)


def test_a_pipe_gets_one_line_a_row() -> None:
    assert table.table(COLUMNS, ROWS) == [
        f"{'tensor':<45}  number  guarantee    formula          rule",
        f"{ROWS[0][0]}       6  approximate  rows: mean of 2  rrrrrrrrr",
        f"{'pooler.bias':<45}       1  exact        copied",
    ]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_columns_that_wrap_where_names_end() -> None:
    assert [plain(line) for line in table.table(COLUMNS, ROWS)] == [
        "tensor                  number  guarantee    formula",
        "encoder.layer.*.             6  approximate  rows: mean of 2",
        "attention.output.",
        "dense.weight",
        "pooler.bias                  1  exact        copied",
    ]


@pytest.mark.usefixtures("terminal")
def test_what_fits_is_left_alone() -> None:
    narrow = [("a.b", "1", "exact", "copied", "r.s")]
    assert plain(table.table(COLUMNS, narrow)[1]) == "a.b          1  exact      copied   r.s"


def test_colours_are_for_terminals_that_want_them(terminal: pytest.MonkeyPatch) -> None:
    assert "\x1b[33mapproximate\x1b[0m" in table.table(COLUMNS, ROWS)[1]
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with terminal.context() as changed:
            changed.setenv(name, value)
            assert "\x1b" not in "".join(table.table(COLUMNS, ROWS))
    terminal.setattr(sys.stdout, "isatty", lambda: False)
    assert "\x1b" not in "".join(table.table(COLUMNS, ROWS))


@pytest.mark.usefixtures("terminal")
def test_escape_sequences_of_others_are_shown_not_obeyed() -> None:
    hostile = "k\x1b[2Jey\n"
    lines = table.table((Column("tensor", wraps=True),), [(hostile,)])
    assert lines[1] == "k\\x1b[2Jey\\n"
    assert table.fields([("note", hostile)]) == ["note  k\\x1b[2Jey\\n"]


@pytest.mark.usefixtures("terminal")
def test_labelled_lines_hang() -> None:
    lines = table.fields(
        [("sizes", "heads 12 -> 6, hidden 384 -> 192, mlp 1536 -> 768, layer 6"), ("to", "x")]
    )
    assert lines == [
        "sizes  heads 12 -> 6, hidden 384 -> 192, mlp 1536 -> 768,",
        "       layer 6",
        "to     x",
    ]


@given(st.text(st.sampled_from("ab. _/"), max_size=80), st.integers(12, 90))
def test_nothing_is_lost_or_too_wide(text: str, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        patch.setitem(os.environ, "COLUMNS", str(width))
        lines = [plain(line) for line in table.table((Column("t", wraps=True),), [(text,)])]
    assert max(map(len, lines)) <= width
    assert "".join(lines[1:]).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_100, "4.10 kB"),
        (90_900_000, "90.9 MB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (9_996_000, "10.0 MB"),
        (141_200_000_000, "141 GB"),
        (10**12, "1.00 TB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_bytes_have_three_digits(nbytes: int, text: str) -> None:
    assert units.format_nbytes(nbytes) == text


def test_counts_have_three_digits() -> None:
    assert [units.format_count(n) for n in (7, 22_700_000, 1_500)] == ["7", "22.7 M", "1.50 K"]
