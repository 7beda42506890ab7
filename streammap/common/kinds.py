"""What the values of an option may be, and how they are written down: the kinds of declare.py."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, final

from streammap.errors import PlanError

Form = Literal["text", "int", "float", "flag", "choice", "many", "object"]
"""How an option is typed on a command line: "many" may be repeated, an "object" can't be typed."""
_MAX_SHOWN = 40
_MAX_WHOLE = 2**40


class Kind:
    """What the values of an option may be, and how they are written down."""

    form: Form = "text"
    choices: tuple[str, ...] = ()
    bare: str | None = None
    """What the option means on a command line without a value; None where it needs one."""
    in_json: bool = True
    """Whether records hold it."""
    from_file: bool = False
    """Whether a text or path as its value names what is read for it."""

    def is_file(self, value: object) -> bool:
        """Whether a value names a file that is read for it."""
        return self.from_file and isinstance(value, str | PurePath)

    def check_typed(self, text: str, name: str) -> None:
        """Look at what was typed on a command line, before anything is opened.

        Raises:
            StreammapError: it can be no value of this kind, which is wrong usage.
        """

    def parse(self, value: Any, name: str) -> Any:
        """The value as the code uses it, from Python or a command line.

        Raises:
            StreammapError: it is not of this kind; `name` is the option's.
        """
        return value

    def decode(self, value: Any, name: str) -> Any:
        """The same from JSON, which may come from anywhere: no file is opened for it."""
        return self.parse(value, name)

    def encode(self, value: Any) -> object:
        """The value for JSON; `decode` gives it back. None is left out, as a default is."""
        return value

    def upgrade(self, value: object) -> object:
        """JSON of a record, which an earlier version may have written, as `encode` gives it now.

        None stands for an option that the record does not have.
        """
        return value


@final
class Whole(Kind):
    """A whole number."""

    form: Form = "int"

    def __init__(self, least: int = 0) -> None:
        """`least` is the smallest that is allowed."""
        self.least = least

    def parse(self, value: Any, name: str) -> int:
        """An int."""
        if type(value) is not int or abs(value) >= _MAX_WHOLE:
            raise PlanError(f"{name} is {shown(value)}, expected a whole number")
        if value < self.least:
            raise PlanError(f"{name} is {value}, expected {self.least} or more")
        return value


@final
class Real(Kind):
    """A finite number."""

    form: Form = "float"

    def __init__(self, least: float = -math.inf, most: float = math.inf, hint: str = "") -> None:
        """Both bounds are allowed themselves."""
        self._least, self._most, self._hint = least, most, hint

    def parse(self, value: Any, name: str) -> float:
        """A float."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and self._least <= value <= self._most and math.isfinite(value):
            return float(value)
        bounded = math.isfinite(self._least) and math.isfinite(self._most)
        expected = f"{self._least:g} to {self._most:g}" if bounded else "a number"
        raise PlanError(f"{name} is {shown(value)}, expected {expected}", hint=self._hint or None)


@final
class Text(Kind):
    """Text."""

    def parse(self, value: Any, name: str) -> str:
        """A str."""
        if not isinstance(value, str) or "\0" in value:
            raise PlanError(f"{name} is {shown(value)}, expected text")
        return value


@final
class Flag(Kind):
    """Yes or no."""

    form: Form = "flag"

    def parse(self, value: Any, name: str) -> bool:
        """A bool."""
        if not isinstance(value, bool):
            raise PlanError(f"{name} is {shown(value)}, expected true or false")
        return value


@final
class Choice(Kind):
    """One of a few words."""

    form: Form = "choice"

    def __init__(self, *choices: str) -> None:
        """`choices` in the order in which help prints them."""
        self.choices = choices

    def parse(self, value: Any, name: str) -> str:
        """One of the choices."""
        if value not in self.choices:
            raise PlanError(f"{name} is {shown(value)}, expected {' or '.join(self.choices)}")
        return str(value)


@final
class Names(Kind):
    """Any number of names."""

    form: Form = "many"

    def parse(self, value: Any, name: str) -> tuple[str, ...]:
        """A tuple of str."""
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise PlanError(f"{name} is {shown(value)}, expected a list of names")
        return tuple(value)


@final
class Table(Kind):
    """An object of JSON."""

    form: Form = "object"

    def parse(self, value: Any, name: str) -> Mapping[str, object]:
        """A mapping."""
        if not isinstance(value, Mapping):
            raise PlanError(f"{name} is {shown(value)}, expected an object")
        return value

    def encode(self, value: Any) -> object:
        """A dict."""
        return dict(value)


@final
class Anything(Kind):
    """A Python object without another form."""

    form: Form = "object"
    in_json = False


def shown(value: object) -> str:
    """A value for a message, however long it is."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
