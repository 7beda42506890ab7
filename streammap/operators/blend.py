"""Blend: any number of checkpoints of one model made one, in one pass.

    mean                 no weights                 sum of x_i / n
    weighted sum         --weights 0.5,0.3,0.2      sum of w_i x_i
    average over time    --ema 0.9                  the last of n averages with this decay
    decay after the fact --decay linear             what a run with decayed updates would be
    task arithmetic      --base BASE --lambda 0.7   base + lambda * sum of w_i (x_i - base)
    stacked layers       --slices '[[0, 0, 24], [1, 8, 32]]'

All is computed in float64 and rounded once, but for averages and slerp of 16-bit tensors, which are
computed in float32. Sources: Ilharco et al., arXiv:2212.04089 (task
arithmetic); Tian et al., WSM, arXiv:2507.17634 (decay).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from streammap.common.kinds import Choice, Real, Whole, shown
from streammap.errors import PlanError, some
from streammap.io import vocabularies
from streammap.operators.declare import (
    Apply,
    Input,
    Operator,
    PlanLike,
    argument,
    check,
    declared,
    option,
)
from streammap.operators.merge_options import DTYPES, Each, Shared, Slices
from streammap.operators.numbers import ByPlace, PerSource, SettingLike
from streammap.operators.ordering.align import AlignLike, Axes, aligned
from streammap.planning.matching import frame
from streammap.planning.merging import merge, settings
from streammap.planning.merging.merge import Recipe
from streammap.planning.merging.methods import registry
from streammap.planning.merging.settings import Setting
from streammap.planning.merging.slices import Slice
from streammap.planning.plan import Plan, Promise, Step

Decay = Literal["linear", "cosine", "1-sqrt"]
_WEIGHTS, _SLICES, _METHOD = "Weights", "Slices", "Method"


@declared
class Blend(Operator):
    """Make any number of checkpoints of one model one: their mean, or a weighted sum.

    SRC gives names, dtypes, config.json and files; with a base, the base does. SRC may be a recipe
    of mergekit (config.yml), which says all by itself.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "blend step1/ step2/ step3/ -o mean/",
        "blend a/ b/ -o sum/ --weights 0.7,0.3",
        "blend code/ maths/ -o both/ --base llama/ --lambda 0.7",
        "blend llama/ -o deep/ --slices '[[0, 0, 24], [0, 8, 32]]'",
        "blend a/ b/ -o between/ --method slerp --t 0.5",
        "blend code/ maths/ -o both/ --base llama/ --method ties --density 0.5",
        "blend code/ maths/ -o both/ --align",
        "blend config.yml -o merged/",
    )

    others: tuple[PlanLike, ...] = argument(
        default=(),
        help="Further checkpoints, for --ema and --decay the oldest first.",
        kind=Input(many=True),
        metavar="[MORE]...",
        kw_only=False,
    )
    weights: Sequence[SettingLike] | str | None = option(
        default=None,
        help="One for each source, such as 0.5,0.3,0.2: any numbers, taken as they are. As JSON or "
        "a file: for each source a number, a list over depth, or rules.",
        group=_WEIGHTS,
        kind=PerSource(),
        metavar="W",
    )
    normalize: bool = option(default=False, help="Divide the weights by their sum.", group=_WEIGHTS)
    ema: float | None = option(
        default=None,
        help="Weights of an exponential moving average with this decay, 0 to 1.",
        group=_WEIGHTS,
        kind=Real(0.0, 1.0, hint="give --ema 0.9"),
        metavar="B",
    )
    decay: Decay | None = option(
        default=None,
        help="Weights that make a run's last checkpoints what decayed updates would have made.",
        group=_WEIGHTS,
        kind=Choice("linear", "cosine", "1-sqrt"),
    )
    base: PlanLike | None = option(
        default=None,
        help="Add up what the sources differ by from this one (task arithmetic).",
        group=_WEIGHTS,
        kind=Input(),
        metavar="BASE",
    )
    lambda_: SettingLike | None = option(
        default=None,
        help="Factor on all that is added to the base.  [default: 1]",
        group=_WEIGHTS,
        kind=ByPlace(),
        metavar="L",
        flag="lambda",
        json="lambda",
    )
    slices: Sequence[object] | str | None = option(
        default=None,
        help="Layers to stack, as JSON or a file: [source, first, one past the last] each; sources "
        "count from 0.",
        group=_SLICES,
        kind=Slices(),
        metavar="S",
    )
    scale: SettingLike | None = option(
        default=None,
        help='Factor on the tensors of slices, such as [{"filter": "down_proj", "value": 0}, 1].',
        group=_SLICES,
        kind=ByPlace(),
        metavar="F",
    )
    untie: bool = option(
        default=False,
        help="Give a tied head a tensor of its own, where only some have that.",
        group=_WEIGHTS,
    )
    align: AlignLike = option(
        default=None,
        help="Put the units of the others in the order of SRC first, of all in that of a base: "
        "all units, or those of some axes (mlp,heads).",
        group=_WEIGHTS,
        kind=Axes(),
        metavar="[AXES]",
    )
    same_tokenizer: bool = option(
        default=False,
        help="Refuse checkpoints whose tokenizers give other numbers to tokens.",
        group=_WEIGHTS,
    )
    method: str | None = option(
        default=None,
        help="linear, slerp, karcher, model_stock, ties, dare_ties ...; by default, what the other "
        "options say.",
        group=_METHOD,
        metavar="NAME",
    )
    t: SettingLike | None = option(
        default=None,
        help="Of slerp: 0 is the first checkpoint, 1 the second.",
        group=_METHOD,
        kind=ByPlace(),
        metavar="T",
    )
    density: SettingLike | None = option(
        default=None,
        help="Of ties, dare, della and breadcrumbs: the share of each difference that is left.",
        group=_METHOD,
        kind=ByPlace(),
        metavar="D",
    )
    seed: int | None = option(
        default=None,
        help="Of dare and della: which random numbers.",
        group=_METHOD,
        kind=Whole(),
        metavar="N",
    )
    parameters: Mapping[str, object] | str | None = option(
        default=None,
        help="Further parameters of the method, as JSON or a file: '{\"rescale\": true}'.",
        group=_METHOD,
        kind=Shared(),
        metavar="P",
    )
    each: Sequence[Mapping[str, object]] | None = option(
        default=None, help="Parameters of the method for each source.", kind=Each()
    )
    as_dtype: str | None = option(
        default=None,
        help="Dtype of the result: F32, BF16 ...; or promoted.",
        kind=DTYPES,
        json="dtype",
    )

    def __post_init__(self) -> None:
        """Read the values, and refuse those that exclude one another."""
        check(self)
        names = ("weights", "ema", "decay")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise PlanError(
                f"--{given[0]} and --{given[1]}: each says all weights", hint="give one of them"
            )
        if self.base is None and self.lambda_ is not None:
            raise PlanError("--lambda needs --base BASE", hint="give both, or neither")

    def arranged(  # type: ignore[override]
        self,
        apply: Apply,
        source: Plan,
        *,
        others: tuple[Plan, ...] = (),
        base: Plan | None = None,
    ) -> tuple[Operator, Plan, Mapping[str, object]]:
        """With all units in the order of the first, or of the base, where that is asked for."""
        inputs = {"others": others, **({} if base is None else {"base": base})}
        if self.align is None:
            return self, source, inputs
        if self.slices is not None:
            raise PlanError(
                "--align and --slices: stacked layers have none that they stand beside",
                hint="align checkpoints first, with `streammap align`, and stack the results",
            )
        if base is None and not others:
            raise PlanError("--align: one checkpoint", hint="give those to align with it")
        moved = others if base is None else (source, *others)
        names = _names((source, *others))[-len(moved) :]
        plans = dict(zip(names, moved, strict=True))
        made = tuple(aligned(apply, self.align, base or source, plans).values())
        alone = replace(self, align=None)
        if base is None:
            return alone, source, {"others": made}
        return alone, made[0], {"others": made[1:], "base": base}

    def plan(
        self, source: Plan, *, others: tuple[Plan, ...] = (), base: Plan | None = None
    ) -> Plan:
        """The blended plan; the source itself where it is a recipe, or was planned, and stays.

        Raises:
            PlanError: nothing to blend, or checkpoints that are not of one model.
        """
        plans = (source, *others, *(() if base is None else (base,)))
        if self == Blend() and len(plans) == 1:
            if source.steps:
                return source
            raise PlanError(
                "one checkpoint and nothing to do",
                hint="give further checkpoints, or --slices; or a recipe (config.yml)",
            )
        names = _names(plans)
        notes: list[str] = []
        self._check_alone(plans)
        if self.same_tokenizer:
            _check_tokenizers(plans, names)
        recipe = self._recipe(1 + len(others), has_base=base is not None)
        if self.untie:
            plans, told = frame.untied(dict(zip(names, plans, strict=True)))
            notes += told
        made, more = merge.merged(plans, names, recipe)
        notes += [*_told(recipe, names), *more]
        framed = plans[recipe.frame]
        promise, reason = _promise(made, framed, recipe)
        step = Step(self.name, self._options(recipe), promise, reason, tuple(notes))
        return replace(
            made,
            sources=tuple(dict.fromkeys(s for one in plans for s in one.sources)),
            steps=(*(step for one in plans for step in one.steps), step),
            levels=() if recipe.slices else framed.levels,
        )

    def _check_alone(self, plans: Sequence[Plan]) -> None:
        """Refuse options for a blend that is one already.

        Raises:
            PlanError: one source, a recipe or another blend, and nothing that is for one.
        """
        steps = plans[0].steps
        is_blend = bool(steps) and steps[-1].operator == self.name
        says = any(one is not None for one in (self.slices, self.scale, self.weights))
        if len(plans) == 1 and is_blend and not says:
            raise PlanError(
                "one checkpoint, which is a blend (or a recipe) already: options for its sources "
                "come too late",
                hint="write a recipe's numbers into it, such as parameters: {seed: 1}; or give "
                "further checkpoints",
            )

    def _recipe(self, n: int, *, has_base: bool) -> Recipe:
        """What is asked for, of n sources and perhaps a base behind them."""
        slices = Slices().slices(self.slices)
        method = registry.load(self.method or self._method(slices, n, has_base=has_base))
        shared: dict[str, Setting] = dict(Shared().settings(self.parameters))
        each = self._each(n)
        options = {
            "lambda": self.lambda_,
            "scale": self.scale,
            "t": self.t,
            "density": self.density,
            "seed": self.seed,
        }
        for name, value in options.items():
            if value is not None:
                shared[name] = ByPlace().setting(value)
        if self.normalize:
            shared["normalize"] = settings.constant(1.0)
        if "weight" in method.parameters and not self._has_weights(slices, each, shared):
            shared["weight"] = settings.constant(1.0)
            if not method.takes_base:
                shared["normalize"] = settings.constant(1.0)
        if has_base and not method.takes_base:
            raise PlanError(f"{method.name} has no base", hint="leave --base out")
        base = n if has_base else None
        return Recipe(
            method.name,
            shared,
            (*each, {}) if each and has_base else each,
            slices,
            base,
            n if has_base else 0,
            self.as_dtype,
        )

    def _method(self, slices: Sequence[Slice], n: int, *, has_base: bool) -> str:
        if has_base:
            return "task_arithmetic"
        alone = all(len(one.spans) == 1 for one in slices) if slices else n == 1
        weighs = any(one is not None for one in (self.weights, self.ema, self.decay))
        return "passthrough" if alone and not weighs else "linear"

    def _each(self, n: int) -> tuple[dict[str, Setting], ...]:
        """The parameters of each source, weights among them.

        Raises:
            PlanError: as many as there are no sources.
        """
        tables = Each().settings(self.each)
        weights = PerSource().settings(self.weights)
        for name, count in (("weights", len(weights)), ("each", len(tables))):
            if count not in (0, n):
                raise PlanError(
                    f"{name}: {count} given, there are {n} sources",
                    hint="give one for each source, in their order; a base has none",
                )
        if self.ema is not None:
            weights = tuple(map(settings.constant, ema_weights(self.ema, n)))
        if self.decay is not None:
            weights = tuple(map(settings.constant, decay_weights(self.decay, n)))
        made = [dict(table) for table in tables] or [{} for _ in range(n)]
        for table, weight in zip(made, weights, strict=False):
            table["weight"] = weight
        return tuple(made) if any(made) else ()

    @staticmethod
    def _has_weights(
        slices: Sequence[Slice],
        each: Sequence[Mapping[str, Setting]],
        shared: Mapping[str, Setting],
    ) -> bool:
        tables = [shared, *each, *(one.parameters for one in slices)]
        tables += [span.parameters for one in slices for span in one.spans]
        return any("weight" in table for table in tables)

    def _options(self, recipe: Recipe) -> dict[str, object]:
        """What was done, for the record."""
        tables: dict[str, object] = {
            "parameters": Shared().encode(recipe.shared) if recipe.shared else None,
            "each": Each().encode(recipe.each) if recipe.each else None,
            "slices": Slices().encode(recipe.slices) if recipe.slices else None,
            "base": recipe.base,
            "dtype": recipe.dtype,
        }
        given = {name: value for name, value in tables.items() if value is not None}
        return {"method": recipe.method, **given}


def ema_weights(decay: float, n: int) -> list[float]:
    """Weights of n checkpoints, oldest first, in the average m <- decay m + (1 - decay) x."""
    last = n - 1
    return [decay**last, *((1.0 - decay) * decay ** (last - j) for j in range(1, n))]


def decay_weights(shape: Decay, n: int) -> list[float]:
    """Weights of n checkpoints, oldest first, whose sum is a run with decayed updates.

    With w_j, the factor on the updates between checkpoint j-1 and j (j = 1 .. k, k = n - 1):

        c_0 = 1 - w_1,  c_j = w_j - w_(j+1),  c_k = w_k,  w_j = shape(j / n)

    linear is 1 - x, so that all weights are 1/n; cosine is (1 + cos(pi x)) / 2.

    Source: Tian et al., WSM, arXiv:2507.17634.
    """
    if shape == "linear":
        return [1.0 / n] * n
    x = [j / n for j in range(1, n)]
    of = {
        "cosine": lambda one: (1.0 + math.cos(math.pi * one)) / 2.0,
        "1-sqrt": lambda one: 1.0 - math.sqrt(one),
    }[shape]
    w = [1.0, *map(of, x), 0.0]
    return [before - after for before, after in itertools.pairwise(w)]


def _check_tokenizers(plans: Sequence[Plan], names: Sequence[str]) -> None:
    """Refuse tokenizers that differ: rows of embeddings would be those of other tokens.

    Raises:
        PlanError: two differ, or one is missing.
        CheckpointError: one can't be read.
    """
    first: vocabularies.Vocabulary | None = None
    for plan, name in zip(plans, names, strict=True):
        place = None if plan.side is None else plan.side.place
        found = None if place is None else vocabularies.read(place)
        if found is None:
            raise PlanError(
                f"{name}: no tokenizer that could be compared",
                hint="leave --same-tokenizer out (tokenizer_source in a recipe), or add its files",
            )
        if first is None:
            first = found
        elif found != first:
            raise PlanError(
                f"{names[0]} and {name}: {_difference(first, found)}, and vocabularies are not "
                "joined here",
                hint="give checkpoints with one tokenizer; or leave --same-tokenizer out "
                "(tokenizer_source in a recipe), and rows are taken by their numbers",
            )


def _difference(a: vocabularies.Vocabulary, b: vocabularies.Vocabulary) -> str:
    """The first token that has another number."""
    if isinstance(a, bytes) or isinstance(b, bytes):
        return "their tokenizers' files differ"
    token = next(one for one in (*a, *b) if a.get(one) != b.get(one))
    numbers = " and ".join("none" if t.get(token) is None else str(t[token]) for t in (a, b))
    return f"token {shown(token)} has the numbers {numbers}"


def _names(plans: Sequence[Plan]) -> list[str]:
    """What messages call the sources: the names of their folders, numbered where they are equal."""
    names = [" + ".join(_read_by(plan)) for plan in plans]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def _read_by(plan: Plan) -> Iterable[str]:
    """The sources whose tensors a plan reads: not one that it was only aligned with."""
    if len(plan.sources) == 1:
        return [plan.sources[0].name]
    read = {id(load.source) for form in plan.targets.values() for load in form.loads()}
    return dict.fromkeys(source.name for source in plan.sources if id(source) in read)


def _told(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Weights, and their sum."""
    n = len(names) - (recipe.base is not None)
    weights = [
        found
        for table in recipe.each or [{}] * n
        if (found := table.get("weight", recipe.shared.get("weight"))) is not None
    ][:n]
    if recipe.slices or len(weights) < n or not weights:
        return []
    told = " + ".join(f"{w} ({name})" for w, name in zip(weights, names, strict=False))
    numbers = [weight.number for weight in weights]
    total = "" if None in numbers else f" = {math.fsum(one for one in numbers if one):.12g}"
    normalize = recipe.shared.get("normalize")
    divided = normalize is not None and any(normalize.numbers)
    if divided and set(numbers) == {1.0} and not recipe.each:
        return [f"the mean of {some(names, limit=10)}"]
    return [f"weights {told}{total}{', divided by their sum' if divided else ''}"]


def _promise(made: Plan, framed: Plan, recipe: Recipe) -> tuple[Promise, str]:
    same = made.targets.keys() == framed.targets.keys() and all(
        form is framed.targets[key] or form == framed.targets[key]
        for key, form in made.targets.items()
    )
    if same and made.config == framed.config:
        return "bit-exact", "all other weights are 0"
    if recipe.slices:
        return "approximate", "layers are stacked, or computed with"
    return "approximate", "the sum of several models' weights is another model"
