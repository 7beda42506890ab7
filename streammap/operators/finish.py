"""Options that any operator's call takes beside its own: they ask for operators after it."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from streammap.common.declare import Declared, declared, option, options_of
from streammap.errors import PlanError
from streammap.operators.convert import Convert, DtypeLike, Dtypes
from streammap.operators.declare import Operator
from streammap.operators.keep_quantised import KeepQuantised

_OUTPUT = "Output"


@declared
class Finish:
    """What form a result has, whatever made it."""

    dtype: DtypeLike = option(
        default=None,
        help="What floating-point tensors become, rounded once: bfloat16, or by parts of keys: "
        "norm=float32,bfloat16.",
        group=_OUTPUT,
        kind=Dtypes(),
        metavar="DTYPE",
    )
    strict: bool = option(
        default=False,
        help="Fail where a number overflows to infinity, or vanishes to 0.",
        group=_OUTPUT,
    )
    keep_quantised: bool = option(
        default=False,
        help="Copy quantised tensors as they are stored; refused where they are computed with.",
        group=_OUTPUT,
    )
    optimizer: bool = option(
        default=False,
        help="Take the optimizer's state along: Adam's moments go with the weights.",
        group=_OUTPUT,
    )
    new_state: Literal["copy", "zero"] | None = option(
        default=None,
        help="With --optimizer: moments of new units and layers begin as copies, or at 0.  "
        "[default: copy]",
        group=_OUTPUT,
    )


def options_beside(operator: type[Operator]) -> Iterator[Declared]:
    """The options of Finish, but those that an operator has itself."""
    own = {one.name for one in options_of(operator)} | {operator.name.replace("-", "_")}
    return (one for one in options_of(Finish) if one.name not in own)


def following(operator: type[Operator] | None, values: Mapping[str, Any]) -> Iterator[Operator]:
    """The operators that follow one: by what was given for Finish.

    Args:
        operator: None for a request, whose operators are not at hand.
        values: Name -> value; those of other options are passed over.

    Raises:
        PlanError: a dtype that weights can't be rounded to, a new state of no optimizer.
    """
    known = options_of(Finish) if operator is None else options_beside(operator)
    given = {one.name: values[one.name] for one in known if values.get(one.name)}
    keeps, carries = given.pop("keep_quantised", False), given.pop("optimizer", False)
    new_state = given.pop("new_state", None)
    if new_state is not None and not carries:
        raise PlanError("--new-state needs --optimizer", hint="give both, or neither")
    if given:
        yield Convert(**given)
    if keeps:
        yield KeepQuantised()
    if carries:
        from streammap.operators.optimizer.carry import CarryOptimizer

        yield CarryOptimizer(new_state=new_state or "copy")
