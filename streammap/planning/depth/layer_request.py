"""Which layers a result has: slices of the source's, lists, or a recipe.

    "0:24,8:32"                 slices in the result's order, as Python reads them: open or negative
                                ends, a step; and numbers, "0:4,6,-1"
    {"drop": "5,9:12"}          all but these
    {"keep": [0, 3, -1]}        these alone, in the source's order
    "solar"                     a recipe, see recipes.py
    {"recipe": "llama-pro", "expand_every": 8}

A slice that reaches beyond the source is refused, where Python would cut it off.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from streammap.architectures.limits import MAX_LAYERS
from streammap.common import strict_json
from streammap.errors import SchemeError, some
from streammap.planning.depth import recipes

Way = Literal["slices", "drop", "keep", "recipe"]
WAYS: tuple[Way, ...] = ("slices", "drop", "keep", "recipe")
_NUMBER = r"[+-]?[0-9]{1,7}"
_PART = re.compile(rf"({_NUMBER})|({_NUMBER})?:({_NUMBER})?(?::({_NUMBER})?)?")
_HINT = "give slices such as 0:24,8:32, numbers such as 0,3,-1, or a recipe: " + ", ".join(
    recipes.RECIPES
)
Part = int | tuple[int | None, int | None, int | None]
"""A layer, or a slice: first, one past the last, step."""


@final
@dataclass(frozen=True, slots=True)
class LayerRequest:
    """Layers of a source, whatever their number is."""

    way: Way
    parts: tuple[Part, ...] = ()
    """Of slices, drop and keep."""
    recipe: str = ""
    parameters: tuple[tuple[str, int], ...] = ()
    """Of the recipe, those that were given."""

    @property
    def zero(self) -> bool:
        """Whether added layers are zero-initialised unless something else is said."""
        return bool(self.recipe) and recipes.RECIPES[self.recipe].zero

    @property
    def text(self) -> str:
        """It in short: "0:24,8:32", "solar"."""
        return self.recipe or ",".join(map(_part_text, self.parts))

    def with_parameters(self, given: Mapping[str, int], where: str) -> "LayerRequest":
        """The same with parameters of its recipe.

        Raises:
            SchemeError: it has none of this name, or is no recipe.
        """
        if not given:
            return self
        if not self.recipe:
            raise SchemeError(
                f"{where} {self.text} is no recipe, and {some(list(given))} is a parameter of one",
                hint=f"recipes are {', '.join(recipes.RECIPES)}",
            )
        table: dict[object, object] = {"recipe": self.recipe}
        table.update(self.parameters)
        table.update(given.items())
        return _recipe(table, where)

    def as_json(self) -> object:
        """What `parse` reads."""
        if self.way == "recipe" and not self.parameters:
            return self.recipe
        if self.way == "recipe":
            return {"recipe": self.recipe, **dict(self.parameters)}
        return self.text if self.way == "slices" and len(self.parts) > 1 else {self.way: self.text}

    def layers(self, n: int, where: str) -> tuple[int, ...]:
        """For each layer of the result, the layer of a source of `n` that it comes from.

        Raises:
            SchemeError: a layer that the source doesn't have, or a result of none or too many.
        """
        if self.recipe:
            return recipes.layers(self.recipe, n, dict(self.parameters), where)
        named: list[int] = []
        for part in self.parts:
            named += _layers_of(part, n, where)
            if len(named) > MAX_LAYERS:
                raise SchemeError(
                    f"{where}: more than {MAX_LAYERS} layers", hint="ask for fewer layers"
                )
        chosen = set(named)
        if self.way != "slices":
            keeps = self.way == "keep"
            named = [i for i in range(n) if (i in chosen) == keeps]
        if not named:
            raise SchemeError(f"{where}: none of {n} layers is left", hint="keep one at least")
        return tuple(named)


def parse(value: object, where: str) -> LayerRequest:
    """Read a request in any of its forms.

    Raises:
        SchemeError: it is none.
    """
    if isinstance(value, LayerRequest):
        return value
    if isinstance(value, Mapping):
        ways = [way for way in WAYS if way in value]
        if len(ways) == 1 and ways[0] == "recipe":
            return _recipe(value, where)
        if len(ways) == 1 and len(value) == 1:
            return LayerRequest(ways[0], parse_parts(value[ways[0]], f"{where}: {ways[0]}"))
        raise SchemeError(
            f"{where}: {some(list(map(str, value)))}, expected one of {', '.join(WAYS)}",
            hint='give {"drop": "5,9"}, or {"recipe": "solar", "trim": 8}',
        )
    if isinstance(value, str) and recipes.named(value) is not None:
        return _recipe({"recipe": value}, where)
    if type(value) is int or (isinstance(value, str) and re.fullmatch(_NUMBER, value.strip())):
        raise SchemeError(
            f"{where} {value} can be read in two ways: layer {value} alone, or a factor",
            hint=f"give {value}:{int(value) + 1} for the layer; `decoalesce --depth` takes factors",
        )
    return LayerRequest("slices", parse_parts(value, where))


def from_json(text: str, where: str) -> object:
    """What a text of JSON says.

    Raises:
        SchemeError: it is not JSON.
    """
    try:
        return strict_json.loads(text.encode())
    except ValueError as error:
        raise SchemeError(f"{where}: not JSON: {error}", hint=_HINT) from error


def is_text(text: str) -> bool:
    """Whether a text is meant as one: slices, several numbers, or a recipe's name."""
    looks = re.fullmatch(r"[-+0-9:,\s]*[:,][-+0-9:,\s]*", text) is not None
    return looks or recipes.named(text) is not None


def is_table(table: Mapping[object, object]) -> bool:
    """Whether a table is meant as one, by its keys."""
    return any(way in table for way in WAYS)


def parse_parts(value: object, where: str) -> tuple[Part, ...]:
    """Numbers and slices, as text or as a list.

    Raises:
        SchemeError: what is neither.
    """
    if isinstance(value, str):
        # A text of every layer that there may be is far shorter.
        listed: list[object] = [*value[: 16 * MAX_LAYERS].split(",")] if value.strip() else []
    elif isinstance(value, list | tuple):
        listed = list(value)
    else:
        listed = [value]
    if not listed or len(listed) > MAX_LAYERS:
        raise SchemeError(f"{where}: {len(listed)} entries, expected 1 to {MAX_LAYERS}", hint=_HINT)
    return tuple(_part(one, where) for one in listed)


def _part(value: object, where: str) -> Part:
    if type(value) is int and abs(value) < 10**7:
        return value
    if isinstance(value, slice):
        bounds = (value.start, value.stop, value.step)
        if all(one is None or (type(one) is int and abs(one) < 10**7) for one in bounds):
            return _checked(bounds, where)
    found = _PART.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise SchemeError(
            f"{where}: {str(value)[:40]!r} is neither a layer nor a slice", hint=_HINT
        )
    if found[1] is not None:
        return int(found[1])
    first, end, step = (None if one is None else int(one) for one in found.groups()[1:])
    return _checked((first, end, step), where)


def _checked(bounds: tuple[int | None, int | None, int | None], where: str) -> Part:
    if bounds[2] == 0:
        raise SchemeError(f"{where}: a slice with a step of 0", hint="give 1 or more, or leave it")
    return bounds


def _layers_of(part: Part, n: int, where: str) -> range:
    """The layers that one part names.

    Raises:
        SchemeError: beyond the source, or none.
    """
    there = f"the source has {n} layers (0 to {n - 1}, or -{n} to -1)"
    if isinstance(part, int):
        if not -n <= part < n:
            raise SchemeError(f"{where}: layer {part}: {there}", hint="name layers that it has")
        return range(part % n, part % n + 1)
    beyond = [bound for bound in part[:2] if bound is not None and not -n <= bound <= n]
    found = range(*slice(*part).indices(n))
    if beyond or not found:
        what = f"reaches to {beyond[0]}" if beyond else "has no layers"
        raise SchemeError(
            f"{where}: {_part_text(part)} {what}: {there}",
            hint=f"slices are first:one past the last, such as 0:{n}",
        )
    return found


def _part_text(part: Part) -> str:
    if isinstance(part, int):
        return str(part)
    first, end, step = ("" if one is None else str(one) for one in part)
    return f"{first}:{end}:{step}" if step else f"{first}:{end}"


def _recipe(table: Mapping[object, object], where: str) -> LayerRequest:
    given = table.get("recipe")
    name = recipes.named(given) if isinstance(given, str) else None
    if name is None:
        raise SchemeError(
            f"{where}: no recipe {str(given)[:40]!r}", hint=f"known: {', '.join(recipes.RECIPES)}"
        )
    known = recipes.RECIPES[name].parameter
    parameters: list[tuple[str, int]] = []
    for key, value in table.items():
        if key == "recipe":
            continue
        if key != known:
            raise SchemeError(
                f"{where}: {name} has no parameter {str(key)[:40]!r}", hint=f"it has {known}"
            )
        if type(value) is not int or not 0 <= value <= MAX_LAYERS:
            raise SchemeError(
                f"{where}: {known} is {str(value)[:40]!r}, expected 0 to {MAX_LAYERS}",
                hint="give a whole number, such as 4",
            )
        parameters.append((known, value))
    return LayerRequest("recipe", recipe=name, parameters=tuple(parameters))
