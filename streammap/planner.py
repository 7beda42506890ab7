"""Plans from plans: apply maps to the axes of a model, or blend two models. Reads no tensor.

`remap` is the heart: for each tensor, the spec says what its dimensions are, the maps say what
becomes of these, and the role says which side applies:

    result layer i  =  sum over layers j of R[i, j] * (out maps) . W_j . (into maps)

Compensation for a tied head (rule "exact"): the head reads the embedding with its producer map, so
the norm before it is read through instead: its gain and bias take the reader's map. Twofold growth
then halves them, and the logits stay the same. Rule "reference" scales the embeddings instead, as
the original tools do, by 2 on the way down and 0.5 on the way up.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999; the fold, Shen et al., arXiv:2203.06211.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from streammap import graph, maps
from streammap import sizes as axes
from streammap.architecture import Dim, Role
from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.graph import Form
from streammap.maps import AxisMap, BlockMap, MapPair
from streammap.model import Family, Model
from streammap.pattern import Expression, Name, Number, Operation
from streammap.plan import Plan, Step

Rule = Literal["exact", "reference"]
RULES: tuple[Rule, ...] = ("exact", "reference")


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a model's axes."""

    pairs: Mapping[str, MapPair]
    """Width axis or alias -> its maps; what is not here stays."""
    layers: AxisMap | None
    """R or G; None keeps the layers."""
    sizes: Mapping[str, int]
    """Axis -> new size, for each axis that changes."""
    rule: Rule
    embedding_factor: float
    """What the rule "reference" multiplies embeddings by."""


def remap(plan: Plan, change: Change, step: Step) -> Plan:
    """The plan with each axis changed.

    Raises:
        PlanError: a tensor that can't be computed with, a size that config.json can't express.
    """
    model = plan.model
    work = _Remapping(plan, model, change)
    targets: dict[str, Form] = {}
    dropped = []
    for family in model.families:
        if family.rule.kind == "drop":
            dropped.append(f"{family.name} ({len(family.members)}): dropped, loaders don't use it")
        else:
            targets.update(work.family(family))
    step = replace(step, notes=(*step.notes, *dropped))
    ordered = {key: targets[key] for key in sorted(targets, key=natural)}
    sizes = {**model.sizes, **change.sizes}
    config = None
    if plan.config is not None:
        config = rewritten_config(plan.config, model, sizes)
    sized = dict(plan.sized)
    for axis, new in change.sizes.items():
        sized[axis] = (sized.get(axis, (model.sizes[axis], 0))[0], new)
    result = replace(plan, targets=ordered, config=config, steps=(*plan.steps, step), sized=sized)
    _check_sizes(result, sizes)
    return result


def blend(source: Plan, target: Plan, alpha: float, step: Step) -> Plan:
    """(1 - alpha) * target + alpha * source, everywhere; the frame (files, dtypes) is target's.

    Raises:
        PlanError: tensors that only one of them has, or whose shapes differ.
    """
    _check_alike(source, target)
    targets: dict[str, Form] = {}
    for key, form in target.targets.items():
        other = source.targets.get(key)
        if other is None or not form.spec.is_float:
            targets[key] = form
        else:
            parts = [(1.0 - alpha, form), (alpha, other)]
            targets[key] = graph.combine(parts, dtype=form.spec.dtype)
    sources = tuple(dict.fromkeys((*source.sources, *target.sources)))
    levels = source.levels or target.levels
    return replace(
        target, targets=targets, sources=sources, steps=(*source.steps, *target.steps, step),
        levels=levels,
    )  # fmt: skip


def natural(key: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", key)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)


def rewritten_config(
    config: Mapping[str, object], model: Model, sizes: Mapping[str, int]
) -> dict[str, object]:
    """config.json with the new sizes: each field that gave a size gives the new one.

    A size that an expression gave ("4 * hidden size") is written out where it no longer holds.

    Raises:
        PlanError: there is no field to write it to.
    """
    changed: dict[str, object] = copy.deepcopy(dict(config))
    spec = model.architecture
    for name, axis in spec.axes.items():
        if sizes.get(name) == model.sizes.get(name):
            continue
        origin = axes.axis_origin(axis, config)
        if isinstance(origin, str):
            _set_field(changed, origin, sizes[name])
    for name, axis in spec.axes.items():
        origin = axes.axis_origin(axis, config)
        if origin is None or isinstance(origin, str) or _is_measured(origin):
            continue
        if axes.evaluate_axis(spec, origin, sizes, {}) == sizes[name]:
            continue
        if not axis.fields:
            raise PlanError(
                f"config.json can't say that {name} is {sizes[name]}: it has no field for it",
                hint="change the axes that it follows from alike",
            )
        _set_field(changed, axis.fields[0], sizes[name])
    for field, expression in spec.config.items():
        value = axes.evaluate_axis(spec, expression, sizes, {})
        if value != axes.evaluate_axis(spec, expression, model.sizes, {}):
            _set_field(changed, field, value)
    return changed


def _set_field(config: dict[str, object], field: str, value: int) -> None:
    *path, last = field.split(".")
    table = config
    for part in path:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise PlanError(f"config.json: {part} is {inner!r}, expected a table")
        table = inner
    table[last] = value


def _is_measured(expression: Expression) -> bool:
    """Whether it reads shapes, so that the tensors themselves tell the new size."""
    match expression:
        case Operation(_, left, right):
            return _is_measured(left) or _is_measured(right)
        case Name() | Number():
            return False
        case _:
            return True


class _Remapping:
    """One change applied to one model: the maps of expressions are built once."""

    def __init__(self, plan: Plan, model: Model, change: Change) -> None:
        self._plan, self._model, self._change = plan, model, change
        self._known: dict[tuple[str, Role], AxisMap | None] = {}
        head = model.architecture.head
        resized = bool(change.pairs)
        self._head = head if head is not None and model.tied and resized else None

    def family(self, family: Family) -> dict[str, Form]:
        """The result's tensors of one family."""
        depth = self._model.architecture.depth_axis
        layers = self._change.layers
        if layers is None or depth not in family.indices:
            return {
                family.key(values): self._tensor(family, ((1.0, key),))
                for values, key in family.members.items()
            }
        at = family.indices.index(depth)
        found: dict[str, Form] = {}
        rests = dict.fromkeys((*v[:at], *v[at + 1 :]) for v in family.members)
        for rest in rests:
            for i in range(layers.n_out):
                row = tuple(
                    (value, family.members[(*rest[:at], j, *rest[at:])])
                    for j, value in layers.members(i)
                )
                zero = ((0.0, family.members[(*rest[:at], 0, *rest[at:])]),)
                found[family.key((*rest[:at], i, *rest[at:]))] = self._tensor(family, row or zero)
        return found

    def _tensor(self, family: Family, row: tuple[tuple[float, str], ...]) -> Form:
        forms = [(value, self._plan.targets[key]) for value, key in row]
        if family.rule.kind == "buffer":
            return forms[0][1]
        blended = forms[0][1] if forms[0][0] == 1.0 and len(forms) == 1 else graph.combine(forms)
        dims = [self._map(family, dim, row[0][1]) for dim in family.dims]
        changes = any(m is not None for m in dims) or blended is not forms[0][1]
        if changes and not blended.spec.is_float:
            raise PlanError(
                f"{row[0][1]}: dtype {blended.spec.dtype} can't be averaged or scaled",
                hint="dequantise the checkpoint, or save it in a float dtype",
            )
        mapped = graph.map_dims(blended, dims)
        return graph.scale(mapped, self._factor(family, row[0][1]))

    def _factor(self, family: Family, key: str) -> float:
        if self._change.rule != "reference" or not self._change.pairs:
            return 1.0
        shares = self._head is not None and self._head.head.match(key) is not None
        is_embedding = family.rule.kind == "embedding" or shares
        return self._change.embedding_factor if is_embedding else 1.0

    def _map(self, family: Family, dim: Dim, key: str) -> AxisMap | None:
        if dim.expression is None:
            return None
        role = self._role(dim.role, key)
        place = (dim.text, role)
        if place not in self._known:
            m = self._of(dim.expression, role)
            self._known[place] = None if m.is_identity else m
        found = self._known[place]
        if found is not None and role == "keep":
            raise ArchitectureError(f"{family.name}: {dim.text} is resized, but has no role")
        return found

    def _role(self, role: Role, key: str) -> Role:
        """The role of a dimension; with a tied head, the norm before it and its readers swap."""
        head = self._head
        if head is None:
            return role
        if role == "in" and head.head.match(key) is not None:
            return "out"
        if self._change.rule == "reference":
            return role
        if role == "in" and any(reader.match(key) is not None for reader in head.readers):
            return "out"
        if role == "out" and head.norm.match(key) is not None:
            return "in"
        return role

    def _of(self, expression: Expression, role: Role) -> AxisMap:
        """The map of a dimension expression: products are Kronecker products, sums stand apart."""
        match expression:
            case Name(name):
                pair = self._change.pairs.get(name)
                if pair is not None:
                    return pair.into if role == "in" else pair.out
                if name in self._model.architecture.aliases:
                    return self._of(self._model.architecture.aliases[name], role)
                return BlockMap((((0, 1.0),),), 1, self._model.sizes[name])
            case Number(value):
                return maps.identity(value)
            case Operation("*", left, right):
                return maps.kron(self._of(left, role), self._of(right, role))
            case Operation("+", left, right):
                return maps.concatenated([self._of(left, role), self._of(right, role)])
            case _:
                raise ArchitectureError(f"{expression}: a dimension is a sum of products")


def _check_sizes(result: Plan, sizes: Mapping[str, int]) -> None:
    """The rewritten config must lead back to the mapped sizes, and fit each tensor."""
    found = result.model.sizes
    wrong = [name for name, size in sizes.items() if found.get(name) != size]
    if wrong:
        name = wrong[0]
        raise PlanError(
            f"{name} would be {sizes[name]}, but config.json would say {found.get(name)}",
            hint="this architecture can't express the request",
        )


def _check_alike(source: Plan, target: Plan) -> None:
    buffers = _buffers(target) | _buffers(source)
    missing = [k for k in target.targets if k not in source.targets and k not in buffers]
    surplus = [k for k in source.targets if k not in target.targets and k not in buffers]
    if missing or surplus:
        told = (
            f"lacks {some(missing)}" if missing else f"has {some(surplus)}, which the target lacks"
        )
        raise PlanError(
            f"the source {told} ({len(missing)} missing, {len(surplus)} surplus of "
            f"{len(target.targets)} tensors)",
            hint="blend two checkpoints of the same model",
        )
    for key, form in target.targets.items():
        other = source.targets.get(key)
        if other is not None and other.spec.shape != form.spec.shape and key not in buffers:
            raise PlanError(
                f"{key}: source shape {list(other.spec.shape)}, "
                f"target shape {list(form.spec.shape)}",
                hint="blend two checkpoints of the same size",
            )
        if other is not None and form.spec.is_float and not other.spec.is_float:
            raise PlanError(f"{key}: source dtype {other.spec.dtype}, target {form.spec.dtype}")


def _buffers(plan: Plan) -> set[str]:
    """Keys that the spec calls buffers; none where no spec is known."""
    try:
        model = plan.model
    except (ArchitectureError, CheckpointError):
        return set()
    return {
        key
        for f in model.families
        if f.rule.kind in ("buffer", "drop")
        for key in f.members.values()
    }
