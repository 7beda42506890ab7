"""Decode the tables of a spec into dataclasses, whose annotations are the format.

A value that stands as `{condition = value, ..., default = value}` is decided by config.json first.
Where the annotation itself is a table (a dataclass or a Mapping), a table is not a condition.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Literal, TypeVar, Union, get_args, get_origin

from streammap.architectures import config_fields
from streammap.errors import ArchitectureError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tables = Mapping[str, object]
Leaf = Callable[[object, str], object]
"""Decodes a value; its second argument says where the value stands, for messages."""
T = TypeVar("T", bound="DataclassInstance")
_MAX_NUMBER = 10**6


class Decoder:
    """Decodes the tables of one spec for one config.json."""

    def __init__(self, config: Mapping[str, object], leaves: Mapping[object, Leaf]) -> None:
        """Decode with leaves of the caller's beside str, bool and float.

        Args:
            leaves: Annotation -> what decodes a value of it.
        """
        self._config = config
        self._leaves = {**_LEAVES, **leaves}

    def table(self, kind: type[T], value: object, where: str) -> T:
        """A table as a dataclass.

        Raises:
            ArchitectureError: an unknown, missing or wrong entry, by its path.
        """
        entries, known = as_table(value, where), _entries(kind)
        unknown = [name for name in entries if name not in known]
        if unknown:
            raise ArchitectureError(
                f"{where}: unknown entry {unknown[0]!r}", hint=f"known: {', '.join(known)}"
            )
        values: dict[str, object] = {}
        for name, (field, annotation, is_required) in known.items():
            path = f"{where}.{name}" if where else name
            if name in entries:
                values[field] = self.value(annotation, entries[name], path)
            elif is_required:
                raise ArchitectureError(f"{path}: no entry, expected one")
        build: Callable[..., T] = kind
        return build(**values)

    def value(self, annotation: object, value: object, where: str) -> object:
        """A value of any annotation that the dataclasses use."""
        leaf = self._leaves.get(annotation)
        if leaf is not None:
            return leaf(self.decide(value, where), where)
        if annotation is object:
            return value
        if isinstance(annotation, type) and is_dataclass(annotation):
            return self.table(annotation, value, where)
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Mapping:
            key, item = arguments
            return {
                self.value(key, name, where): self.value(item, inner, f"{where}.{name}")
                for name, inner in as_table(value, where).items()
            }
        # A table, or a list of tables, is never a condition.
        is_table = is_dataclass(arguments[0]) and arguments[0] not in self._leaves
        decided = value if is_table else self.decide(value, where)
        if origin in (Union, UnionType):  # `X | None`: an empty text or table says "none"
            return self.value(arguments[0], decided, where) if decided else None
        if origin is tuple:
            return tuple(self.value(arguments[0], item, where) for item in as_list(decided, where))
        assert origin is Literal, annotation
        if decided not in arguments:
            raise ArchitectureError(f"{where}: {decided!r} is not one of {', '.join(arguments)}")
        return decided

    def decide(self, value: object, where: str) -> object:
        """The value whose condition config.json meets first.

        Raises:
            ArchitectureError: it meets no condition, and there is no default.
        """
        if not isinstance(value, dict):
            return value
        for condition, choice in value.items():
            if condition == "default" or config_fields.holds(condition, self._config):
                return choice
        raise ArchitectureError(f"{where}: no condition holds, and there is no default")


@cache
def _entries(kind: "type[DataclassInstance]") -> dict[str, tuple[str, object, bool]]:
    """Name of an entry -> field, annotation, whether it must be there.

    A field's metadata may name its entry otherwise, or None: it is not read from the table.
    """
    return {
        entry: (
            field.name,
            field.type,
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
        if (entry := field.metadata.get("entry", field.name)) is not None
    }


def as_table(value: object, where: str) -> Tables:
    """A table."""
    if not isinstance(value, dict):
        raise ArchitectureError(f"{where}: expected a table, found {value!r}")
    return value


def as_list(value: object, where: str) -> list[object]:
    """A list."""
    if not isinstance(value, list):
        raise ArchitectureError(f"{where}: expected a list, found {value!r}")
    return value


def string(value: object, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ArchitectureError(f"{where}: expected a string, found {value!r}")
    return value


def whole_number(value: object, where: str) -> int:
    """A whole number, or its digits."""
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if isinstance(number, bool) or not isinstance(number, int) or abs(number) > _MAX_NUMBER:
        raise ArchitectureError(
            f"{where}: expected a whole number up to {_MAX_NUMBER}, found {value!r}"
        )
    return number


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ArchitectureError(f"{where}: expected true or false, found {value!r}")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArchitectureError(f"{where}: expected a number, found {value!r}")
    if not -_MAX_NUMBER <= value <= _MAX_NUMBER:  # nor nan
        raise ArchitectureError(f"{where}: expected a number up to {_MAX_NUMBER}, found {value!r}")
    return float(value)


_LEAVES: dict[object, Leaf] = {str: string, bool: _flag, float: _number}
