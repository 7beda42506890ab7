"""Plans of an optimizer's means: a plan of weights, with other tensors under the same keys."""

from dataclasses import replace

from streammap.errors import CheckpointError, PlanError, StreammapError, some
from streammap.io.optimizer.state import OptimizerFile, key_of
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Moment, Plan, Resolved

_OTHERS = "is it the state of this model's optimizer? save both in one step"


def of(source: Plan, file: OptimizerFile, what: str, moment: Moment | None) -> Plan:
    """A source's plan with one mean of each parameter in the place of the weights.

    The optimizer may have the experts in the layout of the class, where the weights have them one
    by one, and has a tied tensor once.

    Args:
        what: exp_avg, say.
        moment: What that is; None for a plan that goes through operators as weights do.

    Raises:
        CheckpointError: parameters that are not the source's, or of other shapes.
    """
    targets = {name: graph.load(file.checkpoint, key_of(name, what)) for name in file.entries}
    _check(source, file, what, targets)
    for family in source.model.families:
        if family.rule.kind == "buffer":
            targets |= {key: source.targets[key] for key in family.members.values()}
    made = replace(
        source,
        targets=targets,
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


def parameters(plan: Plan) -> list[str]:
    """The keys that an optimizer has a state of: all but buffers."""
    return [
        key
        for family in plan.model.families
        if family.rule.kind != "buffer"
        for key in family.members.values()
    ]


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
    if any(name not in weights for name in targets):
        return  # another layout: resolving it tells
    heads = source.model.tied_heads
    missing = [
        key
        for key in parameters(source)
        if key not in targets and not any(head.is_head(key) for head in heads)
    ]
    if missing:
        raise CheckpointError(
            f"{where}: no state of {len(missing)} of {len(weights)} parameters: {some(missing)}",
            hint="a parameter that is not trained has none: leave --optimizer out, or save the "
            "state of an optimizer of all parameters",
        )
