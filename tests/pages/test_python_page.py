"""docs/python.md is what the code says; where it differs, this prints the page as it should be."""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

import streammap
from streammap.common.declare import options_of
from streammap.output.save_options import SaveOptions
from tests.pages.reader import ROOT

PAGE = ROOT / "docs" / "python.md"
INTRODUCTION = """\
# Python

Everything here is imported from `streammap`, and loaded when it is first used: `import streammap`
takes milliseconds. A checkpoint that is opened or planned is a `LazyCheckpoint`; nothing is
computed before `save`, `read`, `load_into` or one of their kind. `help(streammap.coalesce)` shows
the same on a terminal.

Sources are paths, `org/name@revision` on the [Hub](hub.md), or [URLs](object-stores.md); so are
outputs. Sizes are numbers of bytes or text such as "256MiB". A test compares this page with
the code.
"""
RUN_OPTIONS = {one.name: " ".join(one.about.help.split()) for one in options_of(SaveOptions)}
"""Options of a run and what is said of them; they are listed once, at LazyCheckpoint.save."""
PLANNED = ("coalesce", "decoalesce", "interpolate", "permute", "restack")
"""Methods that take what the function of the same name takes."""


def page() -> str:
    return "\n".join([INTRODUCTION, *map("\n".join, (functions(), classes(), errors()))])


def exported(kind: Any) -> dict[str, Any]:
    values = {name: getattr(streammap, name) for name in streammap.__all__}
    return {name: value for name, value in values.items() if kind(value)}


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def functions() -> Iterator[str]:
    yield "## Functions\n"
    for name, function in exported(inspect.isfunction).items():
        yield f"### streammap.{name}\n\n```text\n{signature(name, function)}\n```\n"
        yield f"{first_line(function)}\n"
        yield from options(function)
        yield ""


def classes() -> Iterator[str]:
    yield "## Classes\n"
    for name, cls in exported(lambda value: inspect.isclass(value) and not is_error(value)).items():
        yield f"### {name}\n\n{first_line(cls)}\n"
        if is_dataclass(cls) and name != "LazyCheckpoint":
            yield f"Fields: {', '.join(f'`{field.name}`' for field in fields(cls))}.\n"
        members = list(described(cls))
        if members:
            yield from (*members, "")


def described(cls: type) -> Iterator[str]:
    """A line for each public member, and lines for their options."""
    for member, value in vars(cls).items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"- `{member}`: {first_line(value)}"
        elif member in PLANNED:
            yield f"- `{member}(...)`: as `streammap.{member}`, planned and not saved."
        elif inspect.isfunction(value):
            yield f"- `{' '.join(signature(member, value).split())}`: {first_line(value)}"
            yield from (f"  {line}" for line in options(value))


def errors() -> Iterator[str]:
    yield "## Errors\n\nEach has a `message` and, mostly, a `hint`: a thing to do.\n"
    yield "| | |\n|---|---|"
    for name, error in exported(is_error).items():
        yield f"| `{name}` | {first_line(error)} |"
    yield ""


def options(function: Any) -> Iterator[str]:
    """A line for each argument that is documented."""
    known = documented(function)
    is_save = function is streammap.LazyCheckpoint.save
    for name, text in known.items():
        if is_save or RUN_OPTIONS.get(name) != text:
            yield f"- `{name}`: {text}"
    others = [f"`{name}`" for name, text in known.items() if RUN_OPTIONS.get(name) == text]
    if others and not is_save:
        yield f"- {', '.join(others)}: as in `LazyCheckpoint.save`"


def signature(name: str, function: Any) -> str:
    """Names and defaults, without types."""
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        stars = "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""
        default = parameter.default
        has_one = default is not inspect.Parameter.empty
        value = getattr(default, "__name__", repr(default))
        words.append(f"{stars}{parameter.name}" + (f"={value}" if has_one else ""))
    text = f"{name}({', '.join(words)})"
    return "\n".join(textwrap.wrap(text, 100, subsequent_indent="    ", break_long_words=False))


def first_line(value: object) -> str:
    text = inspect.getdoc(value)
    assert text, value
    return text.partition("\n")[0]


def documented(function: object) -> dict[str, str]:
    """Argument -> what its docstring says of it."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^(?:Args|Options):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    entries = re.split(r"^    (?=\w)", section[1], flags=re.MULTILINE)[1:]
    pairs = (entry.partition(":") for entry in entries)
    return {name: " ".join(rest.split()) for name, _, rest in pairs}


def test_the_page_is_what_the_code_says() -> None:
    if PAGE.read_text() != page():
        sys.stdout.write(page())
        pytest.fail("docs/python.md differs; the page as it should be is in the output")


def test_everything_public_is_on_it() -> None:
    text = PAGE.read_text()
    for name in set(streammap.__all__) - {"__version__", "progress"}:
        assert re.search(rf"^(###.*\b{name}|\| `{name}`)", text, re.MULTILINE), name


def test_a_change_of_a_signature_is_seen() -> None:
    def call(a: int, *, b: str = "x", c: object = None) -> None:
        """Do it.

        Args:
            a: How often,
                at least once.
            b: Where.
        """

    assert signature("call", call) == "call(a, *, b='x', c=None)"
    assert documented(call) == {"a": "How often, at least once.", "b": "Where."}
