"""Plans of an optimizer's means: a plan of weights, with other tensors under the same keys."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from streammap.architectures import axis_facts
from streammap.errors import CheckpointError, PlanError, StreammapError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.optimizer.state import OptimizerFile, key_of
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Moment, Plan, Resolved

_OTHERS = "is it the state of this model's optimizer? save both in one step"


def of(
    source: Plan, file: OptimizerFile, keys: Mapping[str, str], what: str, moment: Moment
) -> Plan:
    """A source's plan with one mean of each parameter in the place of the weights.

    The optimizer may have the experts in the layout of the class, where the weights have them one
    by one, and has a tied tensor once.

    Args:
        keys: Name in the state -> key of the plan, where that is another one.
        what: exp_avg, say.
        moment: What that is.

    Raises:
        CheckpointError: parameters that are not the source's, or of other shapes.
    """
    targets = {
        keys.get(name, name): graph.load(file.checkpoint, key_of(name, what))
        for name in file.entries
    }
    _check(source, file, what, targets)
    made = replace(
        source,
        # What has no state stands in with its weights, so that the model is whole; see `carried`.
        targets={**_without(source, file, targets.keys()), **targets},
        sources=(file.checkpoint, *source.sources),
        moment=moment,
        resolved=Resolved(),
    )
    try:
        made.model  # noqa: B018 (resolving it compares names and shapes)
    except StreammapError as error:
        raise CheckpointError(
            f"{file.checkpoint.label}: its parameters are not those of the model: {error.message}",
            hint=_OTHERS,
        ) from error
    return made


def carried(plan: Plan, states: Collection[Checkpoint]) -> list[str]:
    """The keys of a plan of means that are computed from states."""
    own = {id(one) for one in states}
    return [
        key
        for key, form in plan.targets.items()
        if any(id(ref.source) in own for ref in form.loads())
    ]


def _without(source: Plan, file: OptimizerFile, names: Collection[str]) -> dict[str, LinearForm]:
    """The weights that have no state: buffers, tied copies, and what is not trained.

    Raises:
        CheckpointError: some of a family's tensors have one, and others have none.
    """
    found: dict[str, LinearForm] = {}
    same_layout = all(name in source.targets for name in names)
    for family in source.model.families:
        missing = [key for key in family.members.values() if key not in names]
        experts = any(
            axis_facts.is_expert(source.model.architecture, axis)
            for axis in axis_facts.axes_of(source.model, family)
        )
        if experts and not same_layout:
            continue  # the state has them under other names
        if missing and len(missing) < len(family.members):
            raise CheckpointError(
                f"{file.checkpoint.label}: no state of {len(missing)} of {len(family.members)} "
                f"tensors {family.name}: {some(missing)}",
                hint="save the optimizer's state again, or leave --optimizer out",
            )
        found |= {key: source.targets[key] for key in missing}
    return found


def check_squares(key: str, form: LinearForm) -> None:
    """Refuse a sum of squares that may be negative.

    Raises:
        PlanError: naming the tensor.
    """
    for term in form.terms:
        if any(coefficient < 0.0 for coefficient, _ in term.blend):
            raise PlanError(
                f"{key}: its squared gradients would be summed with a negative weight",
                hint="give weights of 0 and more, or leave --optimizer out",
            )


def _check(source: Plan, file: OptimizerFile, what: str, targets: dict[str, LinearForm]) -> None:
    """Compare names and shapes with the weights, where both have one layout."""
    where, weights = file.checkpoint.label, source.targets
    for name, form in targets.items():
        if not form.spec.is_float:
            raise CheckpointError(
                f"{where}: {name}.{what} is {form.spec.dtype}, expected a float", hint=_OTHERS
            )
        weight = weights.get(name)
        if weight is not None and weight.spec.shape != form.spec.shape:
            raise CheckpointError(
                f"{where}: {name}.{what} has shape {list(form.spec.shape)}, the parameter "
                f"{list(weight.spec.shape)}",
                hint=_OTHERS,
            )
