"""Kinds of options whose values are numbers by place (planning/merging/settings.py).

--alpha 0.5       --alpha '[0.2, 0.8]'       --alpha '[{"filter": "mlp", "value": 0}, 0.5]'
--weights 0.5,0.3,0.2                        --weights weights.json
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from streammap.common import strict_json
from streammap.common.kinds import Kind, shown
from streammap.errors import PlanError
from streammap.planning.merging import settings
from streammap.planning.merging.settings import Setting

SettingLike = float | str | Path | Sequence[object] | Mapping[str, object] | Setting
_MAX_NBYTES = 16 * 2**20


class ByPlace(Kind):
    """A number, a list over depth, or rules; as they are, as JSON, or a file of JSON."""

    from_file = True

    def __init__(self, least: float = -math.inf, most: float = math.inf, hint: str = "") -> None:
        """Both bounds are allowed themselves."""
        self._least, self._most, self._hint = least, most, hint

    def is_file(self, value: object) -> bool:
        """Whether it is neither a number nor JSON."""
        return isinstance(value, Path) or (isinstance(value, str) and not _is_written(value))

    def check_typed(self, text: str, name: str) -> None:
        """A number, JSON or a file that is there."""
        check_typed(text, name)

    def parse(self, value: Any, name: str) -> "float | Setting":
        """A number where it is one everywhere, as it was given."""
        return self._checked(_content(value, name), name)

    def decode(self, value: Any, name: str) -> "float | Setting":
        """From JSON."""
        return self._checked(_no_text(value, name), name)

    def encode(self, value: Any) -> object:
        """A number, or rules."""
        return value.as_json() if isinstance(value, Setting) else value

    def setting(self, value: Any) -> Setting:
        """What `parse` gave, as a setting."""
        return value if isinstance(value, Setting) else settings.constant(value)

    def _checked(self, value: object, name: str) -> "float | Setting":
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check(float(value), name)
        setting = settings.parse(value, what=name)
        for each in setting.numbers:
            self._check(each, name)
        number = setting.rules[0].values[0]
        return number if setting == settings.constant(number) else setting

    def _check(self, number: float, name: str) -> None:
        if not self._least <= number <= self._most:  # so is NaN
            raise PlanError(
                f"{name} is {number:g}, expected {self._least:g} to {self._most:g}",
                hint=self._hint or None,
            )


EXTRAPOLATION = (
    "give --alpha 0.5; for weights beyond a model (extrapolation, task arithmetic) see "
    "`streammap blend --help`"
)
"""Hint for an alpha outside 0 to 1."""


@final
class Alpha(ByPlace):
    """A weight of 0 to 1."""

    def __init__(self) -> None:
        """With the hint for numbers beyond."""
        super().__init__(0.0, 1.0, EXTRAPOLATION)


@final
class PerSource(Kind):
    """A number by place for each source, in their order."""

    from_file = True

    def is_file(self, value: object) -> bool:
        """Whether it is neither numbers nor JSON."""
        return isinstance(value, Path) or (isinstance(value, str) and not _is_written(value))

    def check_typed(self, text: str, name: str) -> None:
        """Numbers, JSON or a file that is there."""
        check_typed(text, name)

    def parse(self, value: Any, name: str) -> tuple[Setting, ...]:
        """A setting for each source."""
        return self._settings(_content(value, name), name)

    def decode(self, value: Any, name: str) -> tuple[Setting, ...]:
        """From JSON."""
        return self._settings(_no_text(value, name), name)

    def encode(self, value: Any) -> object:
        """A list with the JSON form of each."""
        return [setting.as_json() for setting in value]

    def settings(self, value: Any) -> tuple[Setting, ...]:
        """What `parse` gave; none where nothing was given."""
        return () if value is None else value

    def _settings(self, value: object, name: str) -> tuple[Setting, ...]:
        if isinstance(value, int | float | Setting):
            value = [value]
        if not isinstance(value, list | tuple):
            raise PlanError(
                f"{name} is {shown(value)}, expected one for each source",
                hint="give --weights 0.5,0.3,0.2, or a JSON list with a number, list or rules each",
            )
        return tuple(settings.parse(one, what=f"{name}[{i}]") for i, one in enumerate(value))


def from_text(text: str, name: str) -> object:
    """What a text says: numbers with commas, JSON, or the content of a file of JSON.

    Raises:
        PlanError: not JSON, or no such file.
    """
    stripped = text.strip()
    if _is_plain(stripped):
        numbers = [float(part) for part in stripped.split(",")]
        return numbers if len(numbers) > 1 else numbers[0]
    if stripped.startswith(("[", "{")):
        content, where = stripped.encode(), name
    else:
        content, where = _read(Path(text), name), f"{name}: {text}"
    try:
        return strict_json.loads(content)
    except ValueError as error:
        raise PlanError(f"{where}: not JSON: {error}") from error


def _content(value: Any, name: str) -> object:
    return from_text(str(value), name) if isinstance(value, str | Path) else value


def check_typed(text: str, name: str, what: str = "a number, JSON") -> None:
    """Refuse what is neither numbers nor JSON, nor a file that is there.

    Args:
        what: What is expected, for the message.

    Raises:
        PlanError: naming it.
    """
    if not _is_written(text):
        _read(Path(text), name, what)


def _no_text(value: object, name: str) -> object:
    """JSON of a record names no file."""
    if isinstance(value, str):
        raise PlanError(f"{name} is {shown(value)}, expected a number or a list")
    return value


def _is_written(text: str) -> bool:
    return _is_plain(text.strip()) or text.strip().startswith(("[", "{"))


def _is_plain(text: str) -> bool:
    try:
        _ = [float(part) for part in text.split(",")]
    except ValueError:
        return False
    return True


def _read(path: Path, name: str, what: str = "a number, JSON") -> bytes:
    from streammap.io.storage import resolve

    try:
        resolve.check_name(str(path))
        with path.open("rb") as file:
            content = file.read(_MAX_NBYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanError(
            f"{name} is {str(path)[:60]!r}, expected {what} or a file of it: {reason}",
            hint="check the path; JSON begins with [ or {",
        ) from error
    if len(content) > _MAX_NBYTES:
        raise PlanError(f"{name}: {path}: more than {_MAX_NBYTES} bytes", hint="is it the file?")
    return content
