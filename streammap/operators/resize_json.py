"""A Resize <-> the options of a call in JSON, all of them values: see request_tree.py.

    {"width": 2, "scheme": {"width_scheme": [[0, 1], [2, 3]]}, "mlp": "=8192",
     "axes": {"moe_mlp": 2}, "sizes": {"layer": 6}, "rule": "reference", "untie": true}

"sizes" are those that the result must have, which Python and the command line know as `target`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

from streammap.errors import PlanError
from streammap.operators import resize_options
from streammap.operators.resize import Direction, Resize
from streammap.planning import requests, scheme
from streammap.planning.map_file import MapLevel
from streammap.planning.requests import GROUPINGS, AxisRequest
from streammap.planning.scheme import Scheme
from streammap.planning.tensor_maps import RULES

_CHOICES: dict[str, tuple[str, ...]] = {
    "grouping": GROUPINGS,
    "rule": RULES,
    "kv_merge": ("mean", "first"),
    "new_layers": ("copy", "zero"),
}
_NUMBERS = ("width", "depth", "head_dim")
_KNOWN = ("scheme", *_NUMBERS, *_CHOICES, "untie", "sizes", "axes", *resize_options.SPACES)


def encode(op: Resize) -> dict[str, object]:
    """The options that are no defaults; its levels apart."""
    defaults = {f.name: f.default for f in fields(Resize)}
    found: dict[str, object] = {}
    if op.scheme is not None:
        found["scheme"] = _scheme(op.scheme)
    for name in (*_NUMBERS, *_CHOICES, "untie"):
        value = getattr(op, name)
        if value != defaults[name]:
            found[name] = value
    found |= {name: _request(request) for name, request in op.spaces.items()}
    if op.axes:
        found["axes"] = {name: _request(request) for name, request in op.axes.items()}
    if op.target is not None:
        found["sizes"] = dict(op.target)
    return found


def decode(
    direction: Direction, given: Mapping[str, object], levels: tuple[MapLevel, ...] | None
) -> Resize:
    """The operator of these options.

    Raises:
        PlanError: an option that is none, or a value of another type.
        SchemeError: groups that are none.
    """
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        raise PlanError(
            f"{direction}: unknown option {unknown[0][:40]!r}", hint=f"known: {', '.join(_KNOWN)}"
        )
    kept: dict[str, object] = {}
    for name in _NUMBERS:
        if name in given:
            kept[name] = _whole(given[name], name)
    for name, choices in _CHOICES.items():
        if name in given:
            if given[name] not in choices:
                raise PlanError(f"{name} is {given[name]!r}, expected {' or '.join(choices)}")
            kept[name] = given[name]
    if "untie" in given:
        if not isinstance(given["untie"], bool):
            raise PlanError(f"untie is {given['untie']!r}, expected true or false")
        kept["untie"] = given["untie"]
    if "scheme" in given:
        kept["scheme"] = _read_scheme(_table(given["scheme"], "scheme"))
    if "sizes" in given:
        table = _table(given["sizes"], "sizes")
        kept["target"] = {name: _whole(value, f"sizes: {name}") for name, value in table.items()}
    axes = _table(given.get("axes", {}), "axes")
    return Resize(
        direction,
        levels=levels,
        spaces={n: _read_request(given[n], n) for n in resize_options.SPACES if n in given},
        axes={name: _read_request(value, name) for name, value in axes.items()},
        **kept,  # type: ignore[arg-type] # each was checked
    )


def _request(request: AxisRequest) -> object:
    if request.groups is not None and request.weights is None:
        return [list(group) for group in request.groups]
    if request.groups is not None and request.weights is not None:
        pairs = zip(request.groups, request.weights, strict=True)
        return {"groups": [{"members": list(m), "weights": list(w)} for m, w in pairs]}
    what = "factor" if request.factor is not None else "size"
    number = request.factor if request.factor is not None else request.size
    if request.grouping is not None:
        return {what: number, "grouping": request.grouping}
    return number if what == "factor" else f"={number}"


def _read_request(value: object, where: str) -> AxisRequest:
    """As parsed, but weights as they stand: to make their sum 1 again would round them again."""
    found = requests.parse_request(value, where)
    if found.weights is None or not isinstance(value, Mapping):
        return found
    groups = [g for g in value["groups"] if isinstance(g, Mapping)]
    if len(groups) != len(found.weights):
        return found
    sums = [sum(g["weights"]) for g in groups]
    if any(abs(total - 1.0) > 1e-9 for total in sums):
        return found
    return replace(found, weights=tuple(tuple(float(w) for w in g["weights"]) for g in groups))


def _scheme(known: Scheme) -> dict[str, object]:
    found = known.as_json()
    found |= {name: _request(request) for name, request in known.spaces.items()}
    if known.axes:
        found["axes"] = {name: _request(request) for name, request in known.axes.items()}
    return found | {name: [] for name in known.unused}


def _read_scheme(content: Mapping[str, object]) -> Scheme:
    found = scheme.load_scheme(content)
    axes = _table(content.get("axes", {}), "axes")
    return replace(
        found,
        spaces={name: _read_request(content[name], r.where) for name, r in found.spaces.items()},
        axes={name: _read_request(axes[name], r.where) for name, r in found.axes.items()},
    )


def _table(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} is {str(value)[:40]!r}, expected an object")
    return value


def _whole(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**40:
        raise PlanError(f"{where} is {str(value)[:40]!r}, expected a whole number")
    return value
