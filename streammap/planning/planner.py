"""Plans from plans: apply maps to the axes of a model. Reads no tensor.

`remap` is the heart: for each tensor, the spec says what its dimensions are, the maps say how these
change, and the role says which side applies:

    result layer i  =  sum over layers j of R[i, j] * (out maps) . W_j . (into maps)

Layers and experts that stand in a key are dimensions like others: their maps choose source tensors.

Compensation for a tied head (rule "exact"): the head reads the embedding with its producer map, so
the norm before it is read through instead: its gain and bias take the reader's map. Twofold growth
then halves them, and the logits stay the same. Rule "reference" scales the embeddings instead, as
the original tools do, by 2 on the way down and 0.5 on the way up.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999; the fold, Shen et al., arXiv:2203.06211.
"""

from collections.abc import Mapping
from dataclasses import replace

from streammap.architectures import axis_facts, axis_words, key_pattern
from streammap.architectures.model import Model
from streammap.architectures.schema import Depth
from streammap.errors import PlanError, StreammapError, some
from streammap.planning import config_json
from streammap.planning.graph import LinearForm
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap
from streammap.planning.plan import Plan, Promise, Step
from streammap.planning.tensor_maps.axis_change import AxisChange
from streammap.planning.tensor_maps.remapping import Remapping

_MAX_TENSORS = 500_000
_OUTPUT = "no head reads the {}: they are what the model outputs, which changes as they do"


def remap(
    plan: Plan, change: AxisChange, step: Step, *, levels: tuple[MapLevel, ...] | None = None
) -> Plan:
    """The plan with each axis changed.

    Args:
        levels: The maps to save with the result; None for those of the plan.

    Raises:
        PlanError: a tensor that can't be computed with, layers that can't be mixed, a size that
            config.json can't express.
    """
    model = plan.model
    sizes = {**model.sizes, **change.sizes}
    work = Remapping(plan, model, change, sizes)
    _check_count(work, model)
    targets: dict[str, LinearForm] = {}
    notes = list(step.notes)
    for family in model.families:
        if family.rule.kind != "drop":
            targets.update(work.family(family))
    notes += _dropped(model)
    fields = dict(change.fields)
    if change.untie:
        targets.update(work.untied(targets))
        fields |= {f"{tied.head.path}tie_word_embeddings": False for tied in model.tied_heads}
    if work.n_after:
        notes.append(f"{work.n_after} tensors of layers after the stack (MTP) are dropped")
    notes += _mixed(model, change)
    notes += work.apart.notes()
    notes += _output(model, change, step.promise)
    config = None
    if plan.config is not None:
        sources = {name: _sources(m, model, name) for name, m in change.layers.items()}
        members = {
            name: [[j for j, _ in m.members(i)] for i in range(m.n_out)]
            for name, m in change.layers.items()
        }
        fields |= _tails(model, change)
        config, more = config_json.rewritten(
            plan.config, model, sizes, sources=sources, members=members, fields=fields
        )
        notes += more
    sized = dict(plan.sized)
    for axis, new in change.sizes.items():
        sized[axis] = (sized.get(axis, (model.sizes[axis], 0))[0], new)
    step = replace(step, notes=tuple(notes))
    ordered = {key: targets[key] for key in sorted(targets, key=key_pattern.natural)}
    result = replace(
        plan,
        targets=ordered,
        config=config,
        steps=(*plan.steps, step),
        sized=sized,
        levels=plan.levels if levels is None else levels,
        request=None,
    )
    _check_sizes(result, sizes)
    return result


def _output(model: Model, change: AxisChange, promise: Promise) -> list[str]:
    """Notes on a function that is kept but for the order and number of what comes out."""
    if promise == "approximate":
        return []
    return [
        _OUTPUT.format(axis_words.units_of(model.architecture, axis))
        for axis in axis_facts.output_axes(model)
        if axis in change.pairs and not change.pairs[axis].out.is_identity
    ]


def _dropped(model: Model) -> list[str]:
    """Notes on tensors that are not in the result: one for all that differ in numbers only."""
    counts: dict[str, int] = {}
    for family in model.families:
        if family.rule.kind == "drop":
            for key in family.members.values():
                name = key_pattern.INDEX.sub("*", key)
                counts[name] = counts.get(name, 0) + 1
    return [f"{name} ({n}): dropped, loaders don't use it" for name, n in counts.items()]


def untie(plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan with a tensor of its own for each tied head, and notes; no step is added.

    Raises:
        PlanError: a head that can't have one.
    """
    check_untie(plan.model)
    change = AxisChange({}, {}, {}, "exact", 1.0, untie=True)
    step = Step("untie", {}, "bit-exact", "the head has a tensor of its own")
    untied = remap(plan, change, step)
    return replace(untied, steps=plan.steps), untied.steps[-1].notes


def check_untie(model: Model) -> None:
    """Refuse a head that can't have a tensor of its own.

    Raises:
        PlanError: its model calls the embedding itself.
    """
    if not all(tied.head.head for tied in model.tied_heads):
        raise PlanError(
            f"{model.name}: --untie, but this head has no tensor of its own",
            hint="leave --untie out: the norm before the head is compensated",
        )


def _check_count(work: Remapping, model: Model) -> None:
    """Refuse a result of more tensors than could be planned: layers times experts grow fast."""
    n_tensors = sum(work.count(family) for family in model.families)
    if n_tensors > _MAX_TENSORS:
        raise PlanError(
            f"the result would have about {n_tensors} tensors, at most {_MAX_TENSORS} are planned",
            hint="ask for fewer layers or experts",
        )


def _sources(m: AxisMap, model: Model, axis: str) -> tuple[int, ...]:
    """For each layer of the result, the source layer whose entries of config.json it gets.

    The one with the largest part; but where the last layer is of a kind of its own, the last one.
    """
    rows = [m.members(i) for i in range(m.n_out)]
    sources = [max(row, key=lambda pair: pair[1])[0] if row else 0 for row in rows]
    is_last = model.architecture.depth.get(axis, Depth()).last
    if is_last and any(j == m.n_in - 1 for j, _ in rows[-1]):
        sources[-1] = m.n_in - 1
    return tuple(sources)


def _mixed(model: Model, change: AxisChange) -> list[str]:
    """Notes on layers that mix kinds of config.json: the entries of one of them count."""
    notes = []
    for axis, m in change.layers.items():
        kinds, sources = model.kinds(axis), _sources(m, model, axis)
        mixed = [i for i in range(m.n_out) if len({kinds[j] for j, _ in m.members(i)}) > 1]
        if mixed:
            first = mixed[0]
            kind = ", ".join(kinds[sources[first]])
            notes.append(
                f"{axis} {some(mixed)}: made of layers of several kinds; {first} is {kind}"
            )
    return notes


def _tails(model: Model, change: AxisChange) -> dict[str, object]:
    """Counts of layers after the stack, which a change of depth drops."""
    counts: dict[str, object] = {}
    for axis in change.layers:
        depth = model.architecture.depth.get(axis, Depth())
        if depth.tail is not None and depth.tail in model.config:
            counts[depth.tail] = 0
    return counts


def _check_sizes(result: Plan, sizes: Mapping[str, int]) -> None:
    """The rewritten config must lead back to the mapped sizes, and fit each tensor.

    The result is resolved once more, as a loader would: a spec that rewrites too little, or maps a
    tensor to another shape than its dimensions say, is caught here and not by the user.
    """
    try:
        resolved = result.model.sizes
    except StreammapError as error:
        raise PlanError(
            f"the result would not fit its config.json: {error.message}",
            hint="ask for other sizes: this model's class has other tensors at these",
        ) from error
    wrong = [name for name, size in sizes.items() if resolved.get(name) != size]
    if wrong:
        name = wrong[0]
        raise PlanError(
            f"{axis_words.shown(result.model.architecture, name)} would be {sizes[name]}, but "
            f"config.json would say {resolved.get(name)}",
            hint="this architecture can't express the request",
        )
