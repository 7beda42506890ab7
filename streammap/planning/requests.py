"""The request on one axis: a factor, a new size, or groups.

    2, "x2"                                   a factor, put together by the grouping asked for
    "to:768"                                  a new size ("=768" is the same)
    [[0, 6], [1, 7], ...]                     groups: entry i lists the units of the large model
                                              that unit i of the small one stands for
    {"factor": 2, "grouping": "adjacent"}     a factor with a grouping of its own
    {"groups": [{"members": [0, 6], "weights": [0.7, 0.3]}, ...]}     weighted members
    {"0": [[0, 6], ...], "1": ..., "*": ...}  a request for each layer, and one for all others;
                                              "dec_layer.0" where layers are in several stacks
    [[[0, 6], ...], [[0, 1], ...], ...]       groups for each layer, in order
    "0:24,8:32", {"drop": "5,9"}, "solar"     units by slices, layers by a recipe: see depth/

Each may stand on the command line, in a scheme file, and in Python. A number alone is a factor up
to MAX_BARE; a larger one may be meant as a size, so it is refused with both readings.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from streammap.architectures.limits import MAX_LAYERS, MAX_SIZE
from streammap.common import strict_json
from streammap.errors import SchemeError, some
from streammap.planning.depth import layer_request
from streammap.planning.depth.layer_request import LayerRequest

Groups = tuple[tuple[int, ...], ...]
Weights = tuple[tuple[float, ...], ...]
Grouping = Literal["stacked", "adjacent"]
GROUPINGS: tuple[Grouping, ...] = ("stacked", "adjacent")
USUAL = "usual"
"""A request without a grouping: factors and widths are stacked, numbers of layers neighbours."""
MAX_BARE = 8
"""Largest factor that a number alone may be: `--layers 12` is a model's size more often than a
factor, and would give 72 layers for 6 without a word."""
MAX_BARE_WIDTH = 16
"""The same of all widths together: no model is 16 wide."""
MAX_PARTS = 200_000
"""Of one map: each takes time and memory to plan."""
_MAX_INDEX = 1_000_000
_MAX_GROUPS = MAX_PARTS
_MAX_TEXT = 10_000_000
_LAYER = re.compile(r"([A-Za-z_][\w.]*\.)?(0|[1-9][0-9]{0,5}|\*)")
"""A layer, with its depth axis before it where there are several."""


@dataclass(frozen=True, slots=True)
class AxisRequest:
    """What is asked of one axis; one of factor, size, groups, layers and taken is given."""

    factor: int | None = None
    size: int | None = None
    groups: Groups | None = None
    weights: Weights | None = None
    """Each member's share of its group's mean; None for equal shares."""
    grouping: Grouping | None = None
    """Which units a factor groups; None for the grouping of the whole request."""
    layers: "tuple[tuple[str, AxisRequest], ...] | None" = None
    """Layers ("3", "dec_layer.3", "*" for all others) and what is asked of the axis in each."""
    taken: LayerRequest | None = None
    """Which units there are, by slices, lists or a recipe; groups beside it say the same."""
    where: str = field(default="", compare=False)
    """Where it was given ("--mlp"), for messages."""
    is_bare: bool = field(default=False, compare=False)
    """Whether the factor is a number alone, which may have been meant as a size."""


def parse_request(value: object, where: str) -> AxisRequest:
    """Parse a request as a user wrote it.

    Raises:
        SchemeError: naming `where`.
    """
    return replace(_request(value, where), where=where)


def _request(value: object, where: str) -> AxisRequest:
    if isinstance(value, AxisRequest):
        return value
    if isinstance(value, str):
        value = _of_text(value, where)
    if type(value) is int:
        if value < 1:
            raise SchemeError(f"{where} is {value}, expected 1 or more")
        _check_size(value, where)
        return AxisRequest(factor=value, is_bare=True)
    if isinstance(value, str):
        spelled = re.fullmatch(r"(=|to:|x)0*([1-9][0-9]{0,12})", value)
        if spelled is not None:
            number = int(spelled[2])
            _check_size(number, where)
            return AxisRequest(factor=number) if spelled[1] == "x" else AxisRequest(size=number)
        if layer_request.is_text(value):
            return AxisRequest(taken=layer_request.parse(value, where))
    if isinstance(value, list | tuple):
        if value and all(map(_is_layer_entry, value)):
            return _of_layers({str(i): one for i, one in enumerate(value)}, where)
        groups, weights = parse_groups(value, where)
        return AxisRequest(groups=groups, weights=weights)
    if isinstance(value, Mapping):
        if layer_request.is_table(value):
            return AxisRequest(taken=layer_request.parse(value, where))
        if value and all(_LAYER.fullmatch(str(key)) for key in value):
            return _of_layers(value, where)
        return _of_table(value, where)
    raise SchemeError(
        f"{where}: {str(value)[:60]!r} is not a request",
        hint="give a factor such as 2 or x2, a size such as to:768, groups such as "
        "[[0, 1], [2, 3]], or slices such as 0:4,6:8",
    )


def _is_layer_entry(value: object) -> bool:
    """Whether an entry of a list is a request of its own, not a group."""
    if isinstance(value, Mapping):
        return "members" not in value
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)


def _of_layers(table: Mapping[object, object], where: str) -> AxisRequest:
    if len(table) > MAX_LAYERS:
        raise SchemeError(f"{where}: {len(table)} layers, at most {MAX_LAYERS}")
    found: dict[str, AxisRequest] = {}
    for key, value in table.items():
        at = f"{where}: {key}"
        one = parse_request(value, at)
        if one.layers is not None:
            raise SchemeError(f"{at}: layers inside of a layer", hint="give groups, or a size")
        if str(key) in found:
            raise SchemeError(f"{at}: is there twice")
        found[str(key)] = one
    return AxisRequest(layers=tuple(found.items()))


def parse_factor(value: object, where: str, *, instead: str) -> AxisRequest:
    """Parse a factor on several axes together.

    Args:
        instead: How a size is asked for, for messages.

    Raises:
        SchemeError: not a factor.
    """
    request = None
    if isinstance(value, int | str | AxisRequest) and not isinstance(value, bool):
        request = parse_request(value, where)
    if request is None or request.factor is None or request.grouping is not None:
        raise SchemeError(
            f"{where} is {str(value)[:60]!r}, expected a factor such as 2 or x2",
            hint=f"a size is asked for by {instead}",
        )
    return request


def check_bare(
    request: AxisRequest,
    own: int,
    units: str,
    *,
    grows: bool,
    size: str = "to:",
    most: int = MAX_BARE,
) -> None:
    """Refuse a number alone that is too large to be a factor beyond doubt.

    Args:
        own: The axis' size in the source.
        units: What is counted: "layers".
        size: How a size is spelled: "to:", or "--layers to:" where another option takes it.
        most: The largest number that is a factor beyond doubt.

    Raises:
        SchemeError: with both readings, what each would give, and how it is written.
    """
    n = request.factor
    if n is None or not request.is_bare or n <= most:
        return
    result = f"{own * n if grows else own / n:.12g}"
    how = f"{n} times" if grows else f"1/{n} of"
    raise SchemeError(
        f"{request.where} {n} can be read in two ways: {n} {units}, or {how} the {own} {units}, "
        f"which is {result}",
        hint=f"give {size}{n} for {n} {units}, x{n} for {result}",
    )


def parse_groups(value: object, where: str) -> tuple[Groups, Weights | None]:
    """Parse groups, and the weights of their members if there are any.

    Raises:
        SchemeError: an empty group, a repeated member, a bad index or weight.
    """
    if not isinstance(value, list | tuple) or not value:
        raise SchemeError(f"{where}: expected a list of groups such as [[0, 6], [1, 7]]")
    if len(value) > _MAX_GROUPS:
        raise SchemeError(f"{where}: {len(value)} groups, at most {_MAX_GROUPS}")
    pairs = [_group(group, f"{where}[{i}]") for i, group in enumerate(value)]
    groups = tuple(members for members, _ in pairs)
    if all(weights is None for _, weights in pairs):
        return groups, None
    return groups, tuple(
        tuple(1.0 / len(members) for _ in members) if weights is None else weights
        for members, weights in pairs
    )


def explicit(value: object) -> object:
    """A request of a record, where a number alone is a factor whatever its size."""
    return f"x{value}" if type(value) is int and value > MAX_BARE else value


def _of_text(text: str, where: str) -> object:
    stripped = text.strip()
    if re.fullmatch(r"-?\d{1,12}", stripped):
        return int(stripped)
    if stripped.startswith(("[", "{")) and len(stripped) <= _MAX_TEXT:
        try:
            return strict_json.loads(stripped.encode())
        except ValueError as error:
            raise SchemeError(f"{where}: not JSON: {error}") from error
    return stripped


def _of_table(table: Mapping[str, object], where: str) -> AxisRequest:
    known = ("factor", "size", "groups", "grouping")
    unknown = [key for key in table if key not in known]
    if unknown:
        raise SchemeError(f"{where}: unknown key {unknown[0]!r}", hint=f"known: {', '.join(known)}")
    given = [key for key in ("factor", "size", "groups") if key in table]
    if len(given) != 1:
        raise SchemeError(f"{where}: expected one of factor, size and groups")
    grouping = next((g for g in GROUPINGS if g == table.get("grouping")), None)
    if "grouping" in table and grouping is None:
        raise SchemeError(f"{where}: grouping {table['grouping']!r}, expected stacked or adjacent")
    value = table[given[0]]
    if given[0] == "groups":
        if grouping is not None:
            raise SchemeError(f"{where}: both groups and a grouping", hint="give one of the two")
        groups, weights = parse_groups(value, where)
        return AxisRequest(groups=groups, weights=weights)
    if type(value) is not int or value < 1:
        raise SchemeError(f"{where}: {given[0]} is {value!r}, expected 1 or more")
    _check_size(value, f"{where}: {given[0]}")
    if given[0] == "size":
        return AxisRequest(size=value, grouping=grouping)
    return AxisRequest(factor=value, grouping=grouping)


def _check_size(value: int, where: str) -> None:
    if value > MAX_SIZE:
        # A number of thousands of digits can't even be written out.
        shown = value if value < 10**20 else "a number of more than 20 digits"
        raise SchemeError(f"{where} is {shown}, at most {MAX_SIZE}", hint="ask for less")


def _group(group: object, where: str) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    if isinstance(group, Mapping):
        if set(group) != {"members", "weights"}:
            raise SchemeError(
                f"{where}: expected members and weights, found {sorted(map(str, group))}"
            )
        members = _members(group["members"], where)
        return members, _weights(group["weights"], len(members), where)
    return _members(group, where), None


def _members(group: object, where: str) -> tuple[int, ...]:
    if not isinstance(group, list | tuple):
        raise SchemeError(f"{where}: expected a list of numbers such as [0, 6], found {group!r}")
    if not group:
        raise SchemeError(f"{where}: an empty group", hint="remove it, or give it a member")
    for member in group:
        if type(member) is not int or not 0 <= member <= _MAX_INDEX:
            raise SchemeError(f"{where}: {member!r} is not an index, expected 0, 1, 2 ...")
    seen: set[int] = set()
    for member in group:
        if member in seen:
            raise SchemeError(
                f"{where}: member {member} is listed twice", hint="name each member once"
            )
        seen.add(member)
    return tuple(group)


def _weights(weights: object, n: int, where: str) -> tuple[float, ...]:
    if not isinstance(weights, list | tuple) or len(weights) != n:
        raise SchemeError(f"{where}: expected {n} weights, found {weights!r}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise SchemeError(f"{where}: {weight!r} is not a weight, expected 0 or more")
    total = sum(weights)
    if not total > 0:
        raise SchemeError(f"{where}: the weights add up to {total}, expected more than 0")
    return tuple(weight / total for weight in weights)


def divided(n_large: int, factor: int, units: str, *, instead: str = "or give groups") -> int:
    """How many groups of `factor` members n_large units make.

    Args:
        units: What they are called: "heads".

    Raises:
        SchemeError: the factor does not divide their number.
    """
    if factor < 1 or n_large % factor:
        divisors = [d for d in range(2, min(n_large, 4096) + 1) if n_large % d == 0]
        raise SchemeError(
            f"{n_large} {units} do not divide into groups of {factor}",
            hint=f"take a factor of {n_large} ({some(divisors, limit=6)}), {instead}",
        )
    return n_large // factor


def settled(request: AxisRequest, own: int, units: str, *, grows: bool) -> AxisRequest:
    """A request by slices with the groups that it means, in its layers too.

    Args:
        own: The axis' size in the source.
        units: What they are called: "heads".

    Raises:
        SchemeError: units that the source does not have; those that shrinking would repeat, or
            growing leave out.
    """
    if request.layers is not None:
        here = tuple((at, settled(one, own, units, grows=grows)) for at, one in request.layers)
        return replace(request, layers=here)
    if request.taken is None:
        return request
    taken = request.taken.layers(own, request.where)
    of_each: list[list[int]] = [[] for _ in range(own)]
    for i, j in enumerate(taken):
        of_each[j].append(i)
    wrong = [j for j, places in enumerate(of_each) if (not places if grows else len(places) > 1)]
    if wrong:
        does, done = ("left out", "grows") if grows else ("repeated", "shrinks")
        raise SchemeError(
            f"{request.where} {request.taken.text}: {units} {some(wrong)} of {own} would be "
            f"{does}, but {'decoalesce' if grows else 'coalesce'} {done}",
            hint="`streammap restack` leaves out and repeats layers",
        )
    groups = tuple(map(tuple, of_each)) if grows else tuple((j,) for j in taken)
    return replace(request, groups=groups)


def uniform(n_large: int, factor: int, grouping: Grouping, *, units: str) -> Groups:
    """Groups of `factor` members each: i with i + n/factor ("stacked"), or neighbours.

    Raises:
        SchemeError: the factor does not divide the number of units.
    """
    n_small = divided(n_large, factor, units)
    return (near_even if grouping == "adjacent" else cyclic)(n_large, n_small)


def near_even(n_large: int, n_small: int) -> Groups:
    """n_small groups of neighbours, as even as possible."""
    bounds = [i * n_large // n_small for i in range(n_small + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))


def cyclic(n_large: int, n_small: int) -> Groups:
    """n_small groups: i with i + n_small, i + 2*n_small ..., as far as they go."""
    return tuple(tuple(range(i, n_large, n_small)) for i in range(n_small))


def copies(n_large: int, n_small: int) -> Groups:
    """n_small groups of n_large // n_small whole copies; units left over are in no group."""
    times = n_large // n_small
    return tuple(tuple(range(i, n_small * times, n_small)) for i in range(n_small))


def check_members(groups: Sequence[Sequence[int]], n_large: int, where: str) -> None:
    """Refuse a member that the large model does not have.

    Raises:
        SchemeError: naming the entry.
    """
    for i, group in enumerate(groups):
        for member in group:
            if member >= n_large:
                raise SchemeError(
                    f"{where}[{i}]: {member} is out of range, the large model has {n_large} "
                    f"(0 to {n_large - 1})",
                    hint="write the scheme for this model; `streammap scheme` prints one",
                )
