"""Options declared once, as fields of a dataclass: for Python, the command line, JSON and help.

    @declared
    class Scale:
        key: str = option(help="Keys to scale, with * for any text.", metavar="GLOB")
        by: float = option(help="The factor.")

`check` reads the values when an object is made, `make` takes them by name, `encode` and `decode` go
to JSON and back, `takes` makes a function whose keywords are a declaration's fields. Its Kind
(kinds.py) says what a value may be; without one, it follows from the annotation.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import PurePath
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    dataclass_transform,
    final,
    get_args,
    get_origin,
    overload,
)

from streammap.common.kinds import Choice, Flag, Kind, Real, Text, Whole, shown
from streammap.errors import PlanError

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
D = TypeVar("D")
R = TypeVar("R")
_KEY = "option"
_MAX_ANNOTATION = 40
_NAMED = "_named"


@final
@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option, apart from its name, type and default."""

    help: str
    group: str
    """Heading that help prints it under."""
    kind: Kind | None
    metavar: str
    flag: str
    """Name on the command line, if not the field's."""
    json: str
    """Name in JSON, if not the field's."""
    off: str
    """Help of the flag that turns it off, where its default is True."""
    positional: bool
    """Whether it is an argument instead of an option: in Python, and on the command line."""


def option(
    *,
    default: Any = MISSING,
    help: str,
    group: str = "Options",
    kind: Kind | None = None,
    metavar: str = "",
    flag: str = "",
    json: str = "",
    off: str = "",
) -> Any:
    """A field that is an option; without a default it must be given."""
    about = Option(help, group, kind, metavar, flag, json, off, positional=False)
    return field(default=default, kw_only=True, metadata={_KEY: about})


def argument(
    *,
    default: Any = MISSING,
    help: str,
    kind: Kind | None = None,
    metavar: str = "",
    kw_only: Literal[False],
) -> Any:
    """A field that is given by its place. Type checkers want `kw_only=False` in the call."""
    about = Option(help, "", kind, metavar, "", "", "", positional=True)
    return field(default=default, kw_only=kw_only, metadata={_KEY: about})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option, argument))
def declared(cls: type[D]) -> type[D]:
    """The class as a frozen dataclass of options, whose values are read when it is made."""
    if not hasattr(cls, "__post_init__"):
        cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@final
@dataclass(frozen=True, slots=True)
class Declared:
    """One option of a declaration."""

    name: str
    default: object
    """MISSING where it must be given."""
    about: Option
    kind: Kind
    type: object
    """What it is annotated with."""

    @property
    def json(self) -> str:
        """Its name in JSON."""
        return self.about.json or self.name

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING


@functools.cache
def _options_of(cls: Any) -> tuple[Declared, ...]:
    return tuple(
        Declared(f.name, f.default, f.metadata[_KEY], f.metadata[_KEY].kind or _kind_of(f), f.type)
        for f in fields(cls)
        if _KEY in f.metadata
    )


def options_of(cls: Callable[..., object]) -> tuple[Declared, ...]:
    """All options of a declaration, in the order in which they are declared."""
    return _options_of(cls)


def check(self: object) -> None:
    """Read each value by its kind; for __post_init__.

    Raises:
        StreammapError: a value that is not of its option's kind.
    """
    named = []
    for one in options_of(type(self)):
        value = getattr(self, one.name)
        if value is not one.default:
            object.__setattr__(self, one.name, one.kind.parse(value, one.name))
            named += [value] * one.kind.is_file(value)
    vars(self)[_NAMED] = tuple(named)


def named_files(self: object) -> tuple[str | PurePath, ...]:
    """What was named for the options whose values are read from files."""
    named: tuple[str | PurePath, ...] = vars(self).get(_NAMED, ())
    return named


def make(cls: Callable[..., D], values: Mapping[str, Any], *, what: str = "") -> D:
    """An object of a declaration from values by name; None stands for the default.

    Args:
        what: Name of what takes these options, for messages.

    Raises:
        StreammapError: an unknown name, a missing option, or a wrong value.
    """
    known = {one.name: one for one in options_of(cls)}
    refuse_unknown(values, known, what)
    given = {
        name: value
        for name, value in values.items()
        if value is not None or known[name].is_required
    }
    for one in known.values():
        if one.is_required and given.get(one.name) is None:
            raise PlanError(f"{_in(what)}{one.name} is missing", hint=f"give {flag_of(one)}")
    return cls(**given)


def encode(self: object) -> dict[str, object]:
    """The options that are not the default, for JSON."""
    values: dict[str, object] = {}
    for one in options_of(type(self)):
        value = getattr(self, one.name)
        if one.kind.in_json and (one.is_required or value != one.default):
            encoded = one.kind.encode(value)
            if encoded is not None:
                values[one.json] = encoded
    return values


def decode(cls: Callable[..., D], content: Mapping[str, Any], *, what: str, **more: Any) -> D:
    """An object of a declaration from JSON, which may be anything.

    Args:
        more: Options that are not in JSON.

    Raises:
        StreammapError: an unknown name, a missing option, or a wrong value.
    """
    options = [one for one in options_of(cls) if one.kind.in_json]
    known = {one.json: one for one in options}
    refuse_unknown(content, known, what)
    for one in options:
        if one.is_required and one.json not in content:
            raise PlanError(f"{_in(what)}{one.json} is missing")
    values = {
        one.name: one.kind.decode(content[one.json], one.json)
        for one in options
        if one.json in content
    }
    return cls(**more, **values)


def part(cls: Callable[..., D], whole: object) -> D:
    """The options of `cls` alone, of an object whose class declares more."""
    made = cls(**{one.name: getattr(whole, one.name) for one in options_of(cls)})
    vars(made)[_NAMED] = named_files(whole)
    return made


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, object], what: str) -> None:
    """Refuse a name that is not known.

    Raises:
        PlanError: with the name that is nearest to it.
    """
    for name in given:
        if name not in known:
            import difflib  # most calls have no use for it

            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
            raise PlanError(f"{_in(what)}unknown option {shown(name)}", hint=hint)


def flag_of(one: Declared) -> str:
    """How an option is typed on the command line: --max-shard-size, --no-fsync."""
    if one.about.positional:
        return (one.about.metavar or one.name).upper()
    name = (one.about.flag or one.name).replace("_", "-")
    return f"--no-{name}" if one.kind.form == "flag" and one.default is True else f"--{name}"


@overload
def takes(
    cls: Callable[P, D], /, *, leads: Callable[..., object] | None = None
) -> Callable[[Callable[[A, B, D], R]], Callable[Concatenate[A, B, P], R]]: ...
@overload
def takes(
    cls: Callable[P, D], /, *, n_first: Literal[1]
) -> Callable[[Callable[[A, D], R]], Callable[Concatenate[A, P], R]]: ...
def takes(cls: Any, /, *, n_first: int = 2, leads: Any = None) -> Any:
    """A decorator: the function's last argument is an object of `cls`, made of keywords.

    Signature and docstring name each option, so that help() and editors show them.

    Args:
        cls: The declaration.
        n_first: Arguments that the function has before.
        leads: Another declaration, of options that are shown first.
    """
    names = [one.name for one in options_of(leads)] if leads is not None else []
    options = sorted(options_of(cls), key=lambda one: one.name not in names)

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        return _by_name(function, cls, options, n_first=n_first)

    return decorate


def _by_name(
    function: Callable[..., R],
    cls: Callable[..., object],
    options: Sequence[Declared],
    *,
    n_first: int,
) -> Callable[..., R]:
    """`function(*first, object of cls)` as a function that takes the options by name.

    Arguments of the declaration come after the very first parameter, before the others: source,
    target, output. Those that may be left out come last. Where there may be any number of one, all
    that follows by place is of it, and the function's other parameters are keywords.
    """
    signature = inspect.signature(function)
    first = list(signature.parameters.values())[:n_first]
    arguments = [_parameter(one) for one in options if one.about.positional]
    many = next((p for p in arguments if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    needed = [p for p in arguments if p.default is inspect.Parameter.empty and p is not many]
    others = [p for p in arguments if p not in needed and p is not many]
    by_place = [first[0], *needed, *(first[1:] if many is None else ()), *others]
    names = [parameter.name for parameter in by_place]

    @functools.wraps(function)
    def call(*values: Any, **named: Any) -> R:
        given: list[tuple[str, Any]] = list(zip(names, values, strict=False))
        if len(values) > len(names):
            if many is None:
                raise TypeError(f"{call.__name__}() takes {len(names)} arguments by place")
            given.append((many.name, _spread(values[len(names) :])))
        for name, value in given:
            if name in named:
                raise TypeError(f"{call.__name__}() got two values for {name!r}")
            named[name] = value
        for parameter in first:
            if parameter.name not in named and parameter.default is inspect.Parameter.empty:
                raise TypeError(f"{call.__name__}() is missing {parameter.name!r}")
        leading = [named.pop(parameter.name, parameter.default) for parameter in first]
        return function(*leading, make(cls, named, what=call.__name__))

    by_name = [_parameter(one) for one in options if not one.about.positional]
    if many is not None:
        keyword = inspect.Parameter.KEYWORD_ONLY
        by_name = [many, *(p.replace(kind=keyword) for p in first[1:]), *by_name]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*by_place, *by_name]
    )
    call.__doc__ = _documented(function.__doc__ or "", options)
    return call


def _spread(values: Sequence[Any]) -> Sequence[Any]:
    """Any number of values; those of a list, where it stands for them."""
    return values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values


def _parameter(one: Declared) -> inspect.Parameter:
    by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if one.about.positional and one.kind.form == "many":
        return inspect.Parameter(one.name, inspect.Parameter.VAR_POSITIONAL)
    kind = by_place if one.about.positional else inspect.Parameter.KEYWORD_ONLY
    default = inspect.Parameter.empty if one.is_required else one.default
    annotation = one.type if len(str(one.type)) <= _MAX_ANNOTATION else inspect.Parameter.empty
    return inspect.Parameter(one.name, kind, default=default, annotation=annotation)


def _documented(text: str, options: Sequence[Declared]) -> str:
    """A docstring with a line for each option, before its Raises section."""
    lines = [f"    {one.name}: {one.about.help}" for one in options]
    before, raises, after = inspect.cleandoc(text).partition("\nRaises:")
    return "\n".join([before.rstrip(), "", "Options:", *lines, *([raises + after] * bool(raises))])


def _kind_of(one: "Field[Any]") -> Kind:
    """The kind that an annotation says; `| None` only says that it may be left out."""
    types_ = [one.type]
    if get_origin(one.type) in (Union, types.UnionType):
        types_ = [found for found in get_args(one.type) if found is not type(None)]
    if len(types_) == 1 and get_origin(types_[0]) is Literal:
        return Choice(*get_args(types_[0]))
    kinds: dict[object, Kind] = {bool: Flag(), int: Whole(), float: Real(), str: Text()}
    if len(types_) != 1 or types_[0] not in kinds:
        raise TypeError(f"option {one.name}: give a kind for {one.type!r}")
    return kinds[types_[0]]


def _in(what: str) -> str:
    return f"{what}: " if what else ""
