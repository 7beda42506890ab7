"""Restack: drop, repeat or insert layers. planning/depth/ says how they are chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, final

from streammap.common.kinds import Choice, Kind, Whole
from streammap.errors import PlanError
from streammap.operators.declare import Operator, check, declared, option
from streammap.planning.depth import layer_request, recipes
from streammap.planning.depth.layer_request import LayerRequest

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.architectures.model import Model
    from streammap.planning.map_file import MapLevel
    from streammap.planning.maps import BlockMap
    from streammap.planning.plan import Plan

LayersLike = str | Sequence[object] | Mapping[str, object] | LayerRequest
"""Slices and numbers as text or a list, a recipe, or a table of these by stacks."""
_WHICH, _RECIPE = "Which layers", "Parameters of recipes"
_WAYS = ("layers", "drop_layers", "keep_layers")
_PARAMETERS = ("trim", "expand_every", "times", "block")
_STACKS = {"encoder": "enc_layer", "decoder": "dec_layer"}
"""Words for stacks, and the axes that they mean."""
Requests = Mapping[str, LayerRequest]
"""Stack -> which of its layers; "" for the model's only one, or the one that is named."""


@final
class LayersOf(Kind):
    """Which layers: one request, or one for each stack."""

    def __init__(self, way: Literal["slices", "drop", "keep"]) -> None:
        """`way` is what a list of layers means."""
        self._way = way

    def check_typed(self, text: str, name: str) -> None:
        """What can be read without the model."""
        self.parse(text, name)

    def parse(self, value: Any, name: str) -> Requests:
        """From text, a list or a table; JSON as text too."""
        where = f"--{name.replace('_', '-')}"
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            value = layer_request.from_json(value, where)
        if isinstance(value, Mapping) and not layer_request.is_table(value):
            return {str(stack): self._one(one, f"{where}: {stack}") for stack, one in value.items()}
        return {"": self._one(value, where)}

    def _one(self, value: Any, where: str) -> LayerRequest:
        if self._way == "slices":
            return layer_request.parse(value, where)
        if isinstance(value, LayerRequest) and value.way == self._way:
            return value
        return LayerRequest(self._way, layer_request.parse_parts(value, where))

    def encode(self, value: Requests) -> object:
        """Its JSON form."""
        table = {
            stack: one.as_json() if self._way == "slices" else one.text
            for stack, one in value.items()
        }
        return table.get("", table)


@declared
class Restack(Operator):
    """Change the depth: drop, keep, repeat or insert layers (prune, deepen, upscale).

    Zero-initialised layers are the identity at first, so that the function stays; copies run twice.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "restack llama/ solar/ --layers 0:24,8:32",
        "restack llama/ pruned/ --drop-layers 5,9,11",
        "restack llama/ pro/ --layers llama-pro --expand-every 8",
        "restack t5/ small/ --stack encoder --keep-layers ::2",
    )

    layers: LayersLike | None = option(
        default=None,
        help="Slices of the source's layers, in the result's order, such as 0:24,8:32; or a "
        f"recipe: {', '.join(recipes.RECIPES)}.",
        group=_WHICH,
        kind=LayersOf("slices"),
        metavar="S",
    )
    drop_layers: LayersLike | None = option(
        default=None,
        help="All layers but these: 5,9,11 or -4:.",
        group=_WHICH,
        kind=LayersOf("drop"),
        metavar="S",
    )
    keep_layers: LayersLike | None = option(
        default=None,
        help="These layers alone: 0:8,-1.",
        group=_WHICH,
        kind=LayersOf("keep"),
        metavar="S",
    )
    stack: str | None = option(
        default=None,
        help="Of a model with several stacks of layers, the one that is changed: encoder, decoder, "
        "or its axis, as `inspect` lists them.",
        group=_WHICH,
        metavar="NAME",
    )
    new_layers: Literal["copy", "zero"] | None = option(
        default=None,
        help="zero: added layers are zero-initialised (identity) layers, the function stays.  "
        "[default: copy; zero for llama-pro]",
        group=_WHICH,
        kind=Choice("copy", "zero"),
    )
    trim: int | None = option(
        default=None,
        help="Of solar: so many layers are left out at the joint of each half.  "
        "[default: a quarter]",
        group=_RECIPE,
        kind=Whole(),
        metavar="N",
    )
    expand_every: int | None = option(
        default=None,
        help="Of llama-pro: behind so many layers comes a new one.  [default: 4]",
        group=_RECIPE,
        kind=Whole(least=1),
        metavar="N",
    )
    times: int | None = option(
        default=None,
        help="Of g_stack: how often all layers are there.  [default: 2]",
        group=_RECIPE,
        kind=Whole(least=2),
        metavar="N",
    )
    block: int | None = option(
        default=None,
        help="Of midas and lidas: so many layers are there twice.  [default: 4]",
        group=_RECIPE,
        kind=Whole(least=1),
        metavar="N",
    )

    def __post_init__(self) -> None:
        """Read the values; one of the three must say which layers there are."""
        check(self)
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            shown = [f"--{name.replace('_', '-')}" for name in (given or _WAYS)]
            raise PlanError(
                f"{' and '.join(shown)}" if given else "nothing says which layers there are",
                hint=f"give one of {', '.join(shown)}",
            )
        self._asked()

    def _asked(self) -> tuple[str, Requests]:
        """The option that says which layers there are, and what it says of each stack.

        Raises:
            SchemeError: parameters of no recipe.
            PlanError: a stack named twice.
        """
        name = next(name for name in _WAYS if getattr(self, name) is not None)
        asked = cast("Requests", getattr(self, name))
        where = f"--{name.replace('_', '-')}"
        if self.stack is not None and "" not in asked:
            raise PlanError(
                f"--stack {self.stack}, and {where} names stacks itself", hint="give one of the two"
            )
        given = {p: getattr(self, p) for p in _PARAMETERS if getattr(self, p) is not None}
        return where, {
            stack: request.with_parameters(given, where) for stack, request in asked.items()
        }

    def plan(self, source: "Plan") -> "Plan":
        """The plan with these layers.

        Raises:
            SchemeError: layers that the model does not have.
            PlanError: nothing changes, or layers that can't be where they would be.
        """
        from streammap.planning import exactness, planner
        from streammap.planning.depth import fate
        from streammap.planning.maps import BlockMap
        from streammap.planning.plan import Step
        from streammap.planning.tensor_maps.axis_change import AxisChange

        model, (where, asked) = source.model, self._asked()
        new_layers = self.new_layers or (
            "zero" if any(one.zero for one in asked.values()) else "copy"
        )
        maps: dict[str, BlockMap] = {}
        for stack, request in asked.items():
            axis = _axis(model, stack or self.stack, where)
            n = model.sizes[axis]
            taken = request.layers(n, where)
            if taken != tuple(range(n)):
                maps[axis] = BlockMap(tuple(((j, 1.0),) for j in taken), n)
        if not maps:
            raise PlanError(
                f"{where}: all layers stay where they are", hint="leave some out, or repeat some"
            )
        becomes = {axis: fate.of_map(m) for axis, m in maps.items()}
        silent: dict[str, frozenset[int]] = {}
        if new_layers == "zero":
            if not any(one.new for one in becomes.values()):
                raise PlanError(
                    "--new-layers zero, but no layers are added", hint="give --layers llama-pro"
                )
            silent = {axis: fate.zeroed(model, axis, one) for axis, one in becomes.items()}
        by_axis = {
            axis: exactness.of_depth(model, axis, m, grows=False, silent=silent.get(axis))
            for axis, m in maps.items()
        }
        promise, reason = exactness.worst(by_axis)
        notes = [
            note
            for axis, one in becomes.items()
            for note in fate.notes(model, axis, one, zero=new_layers == "zero")
        ]
        if not silent:
            notes += fate.advice(model, list(becomes.values()))
        options: dict[str, object] = {
            "layers": {axis: fate.words(one) for axis, one in becomes.items()}
        }
        if silent:
            options["new_layers"] = "zero"
        sizes = {axis: m.n_out for axis, m in maps.items() if m.n_out != m.n_in}
        change = AxisChange({}, maps, sizes, "exact", 1.0, silent=silent)
        step = Step(self.name, options, promise, reason, tuple(notes), by_axis)
        made = planner.remap(source, change, step, levels=_levels(source, maps, silent))
        rounded = None if promise == "approximate" else exactness.rounding(made.targets)
        if rounded is None:
            return made
        *before, last = made.steps
        return replace(made, steps=(*before, replace(last, notes=(*last.notes, rounded))))


def _axis(model: "Model", name: str | None, where: str) -> str:
    """The depth axis of a stack.

    Raises:
        PlanError: there is no such stack, or several and none is named.
    """
    there = [axis for axis in model.architecture.depth_axes if model.sizes.get(axis)]
    if name is None and len(there) == 1:
        return there[0]
    known = {word: axis for word, axis in _STACKS.items() if axis in there}
    known |= {axis: axis for axis in there}
    if name in known:
        return known[name]
    shown = ", ".join(f"{axis} ({model.sizes[axis]} layers)" for axis in there) or "none"
    if name is None:
        raise PlanError(
            f"{where}: {model.name} has several stacks of layers: {shown}",
            hint=f"say which one: --stack {next(iter(there), '')}",
        )
    raise PlanError(f"{model.name} has no stack {name!r}", hint=f"it has {shown}")


def _levels(
    source: "Plan", maps: "Mapping[str, BlockMap]", silent: Mapping[str, frozenset[int]]
) -> "tuple[MapLevel, ...]":
    """The maps to save: those that lead back, or none where layers are both dropped and copied."""
    from streammap.planning.map_file import MapLevel
    from streammap.planning.maps import BlockMap, merging

    level: dict[str, BlockMap] = {}
    for axis, m in maps.items():
        if max(m.uses) <= 1:
            level[axis] = m
            continue
        if 0 in m.uses:
            return ()
        places: list[list[int]] = [[] for _ in range(m.n_in)]
        for i in range(m.n_out):
            places[m.members(i)[0][0]].append(i)
        new = silent.get(axis, frozenset())
        weights = [[0.0 if i in new else 1 / len(row) for i in row] for row in places]
        if new:
            weights = [[1.0 if w else 0.0 for w in row] for row in weights]
        level[axis] = merging(places, m.n_out, weights=weights)
    made = MapLevel(level)
    return (
        source.levels
        if made.digest in {one.digest for one in source.levels}
        else (*source.levels, made)
    )
