"""Reading values from a spec file's tables: each is what is expected, or an error says so."""

from collections.abc import Mapping, Sequence

from streammap.errors import ArchitectureError

Tables = Mapping[str, object]
_MAX_NUMBER = 10**6


def table(content: Tables, name: str) -> Tables:
    """A table of tables by name; empty where it is not there."""
    return as_table(content.get(name, {}), f"[{name}]")


def as_table(value: object, where: str) -> Tables:
    """A table."""
    if not isinstance(value, dict):
        raise ArchitectureError(f"{where} is no table")
    return value


def only(found: Tables, entries: Sequence[str], name: str) -> Tables:
    """A table that has no other entries than these."""
    unknown = [entry for entry in found if entry not in entries]
    if unknown:
        raise ArchitectureError(
            f"[{name}]: unknown entry {unknown[0]!r}", hint=f"known: {', '.join(entries)}"
        )
    return found


def listed(value: object, where: str) -> list[object]:
    """A list."""
    if not isinstance(value, list):
        raise ArchitectureError(f"{where}: expected a list, found {value!r}")
    return value


def strings(value: object, where: str) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ArchitectureError(f"{where}: expected a list of strings, found {value!r}")
    return tuple(value)


def string(value: object, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ArchitectureError(f"{where}: expected a string, found {value!r}")
    return value


def number(value: object, where: str) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArchitectureError(f"{where}: expected a number, found {value!r}")
    if not -_MAX_NUMBER <= value <= _MAX_NUMBER:  # nor nan
        raise ArchitectureError(f"{where}: expected a number up to {_MAX_NUMBER}, found {value!r}")
    return float(value)
