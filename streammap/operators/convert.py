"""Convert: the same weights in another form: dtypes, layout of experts, tied heads, vocabulary."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, final

from streammap.common.declare import encode
from streammap.common.kinds import Kind, Whole
from streammap.errors import PlanError
from streammap.operators.declare import Operator, declared, option

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.planning.conversion.casting import DtypeRules
    from streammap.planning.plan import Plan, Promise

    Changed = tuple[Plan, tuple[Promise, str], tuple[str, ...]]
    """A plan, what its change promises and why, and notes."""

DtypeLike = Union[str, Mapping[str, object], "DtypeRules", None, Any]  # not imported here
"""A dtype by its name or torch's own, "KEY=DTYPE,...,DTYPE", or a table of these."""
_VOCABULARY = "Vocabulary"


@final
class Dtypes(Kind):
    """Dtypes, for all tensors or by what is in their keys."""

    def parse(self, value: Any, name: str) -> "DtypeRules":
        """The rules."""
        from streammap.planning.conversion import casting

        return casting.parse(value, name)

    def encode(self, value: Any) -> object:
        """As text."""
        return str(value)


@declared
class Convert(Operator):
    """Change a checkpoint's form: dtype, experts' layout, tied head, vocabulary, kind of files."""

    examples: ClassVar[tuple[str, ...]] = (
        "convert llama/ half/ --dtype bfloat16",
        "convert llama/ half/ --dtype norm=float32,bfloat16 --strict",
        "convert pytorch_model.bin safe/ --config config.json",
        "convert mixtral/ fused/ --layout runtime",
        "convert llama/ padded/ --vocab-multiple 64",
    )

    dtype: DtypeLike = option(
        default=None,
        help="What floating-point tensors become: bfloat16, or by parts of keys: "
        "norm=float32,bfloat16.",
        kind=Dtypes(),
        metavar="DTYPE",
    )
    strict: bool = option(
        default=False, help="Fail where a number overflows to infinity, or vanishes to 0."
    )
    layout: Literal["hub", "runtime"] | None = option(
        default=None,
        help="Experts one by one (hub), or stacked as transformers has them (runtime).",
    )
    tie: bool = option(
        default=False, help="Drop a head's own tensor that is equal to the embedding."
    )
    untie: bool = option(default=False, help="Give a tied head a tensor of its own.")
    vocab: int | None = option(
        default=None,
        help="Number of tokens.",
        group=_VOCABULARY,
        kind=Whole(1),
        metavar="N",
    )
    vocab_multiple: int | None = option(
        default=None,
        help="Round the number of tokens up to a multiple of this.",
        group=_VOCABULARY,
        kind=Whole(1),
        metavar="N",
    )
    vocab_rows: Literal["mean", "zero", "normal"] = option(
        default="mean",
        help="What new tokens get: the mean of all, 0, or a draw from N(mean, 1e-9 covariance).",
        group=_VOCABULARY,
    )
    seed: int = option(
        default=0, help="Which random draw.", group=_VOCABULARY, kind=Whole(), metavar="N"
    )

    def plan(self, source: "Plan") -> "Plan":
        """The converted plan.

        Raises:
            PlanError: options that do not fit the model; a head that can't be tied.
        """
        if self.tie and self.untie:
            raise PlanError("--tie and --untie", hint="give one of them")
        from streammap.planning.plan import PROMISES, Step

        made, notes = source, list[str]()
        reasons: list[tuple[Promise, str]] = []
        for change in self._changes():
            made, reason, more = change(made)
            reasons.append(reason)
            notes += more
        unchanged: tuple[Promise, str] = ("bit-exact", "the weights stay as they are")
        weakest = max(reasons, key=lambda one: PROMISES.index(one[0]), default=unchanged)
        step = Step(self.name, self._options(), *weakest, tuple(notes))
        return replace(
            made, steps=(*source.steps, step), strict=source.strict or self.strict, request=None
        )

    def _changes(self) -> "Iterator[Callable[[Plan], Changed]]":
        """What is asked for, in the order in which it is done."""
        from streammap.planning.conversion import casting, layouts, tying, vocabulary

        if self.untie:
            yield _untied
        if self.tie:
            yield tying.tie
        if self.vocab is not None or self.vocab_multiple is not None:
            yield partial(
                vocabulary.resize,
                size=self.vocab,
                multiple=self.vocab_multiple,
                fill=self.vocab_rows,
                seed=self.seed,
            )
        if self.layout is not None:
            yield partial(layouts.change, layout=self.layout)
        if self.dtype is not None:
            yield partial(casting.cast, rules=casting.parse(self.dtype, "dtype"))

    def _options(self) -> dict[str, object]:
        """What determines the result: not whether losses are refused, so that a run can go on."""
        return {name: value for name, value in encode(self).items() if name != "strict"}


def _untied(plan: "Plan") -> "Changed":
    """The plan with a tensor of its own for each tied head.

    Raises:
        PlanError: no head is tied.
    """
    from streammap.planning import planner

    if not plan.model.tied:
        raise PlanError("--untie, but no head is tied to the embedding", hint="leave it out")
    made, notes = planner.untie(plan)
    return made, ("bit-exact", "the head has a tensor of its own"), notes
