"""Several models made one, tensor by tensor, by one of the methods.

One source is the frame: the result has its names, config.json and files. A parameter of a method is
looked for where it is said most closely: for a source in a slice, for the slice, for the source,
for all; the first rule that takes the tensor counts. What is said of a source alone sees the key
that the source has, all else the key of the result: mergekit's order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from streammap.errors import ArchitectureError, CheckpointError, PlanError
from streammap.io.dtypes import HALVES
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.matching import frame, pairing
from streammap.planning.matching.frame import Match, Words
from streammap.planning.merging import places
from streammap.planning.merging.methods import registry
from streammap.planning.merging.methods.base import Method, Parameter, Part
from streammap.planning.merging.settings import Place, Setting
from streammap.planning.merging.slices import Layered, Settings, Slice, Stack
from streammap.planning.plan import Plan

PROMOTED = "promoted"
"""A dtype that holds the numbers of all of a tensor's sources."""
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_SUMS = ("linear", "passthrough", "task_arithmetic")
"""Methods that are weighted sums, so that moments can be summed alike."""
_ORDER = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is asked for."""

    method: str
    shared: Settings = field(default_factory=dict)
    """Parameter -> numbers, for all sources."""
    each: tuple[Settings, ...] = ()
    """The same for each source; empty where none has its own."""
    slices: tuple[Slice, ...] = ()
    """Empty where all layers stay where they are."""
    base: int | None = None
    """Number of the source that is the base."""
    frame: int = 0
    """Number of the source that gives names, config.json and files."""
    dtype: str | None = None
    """Of all tensors; PROMOTED, or None for the frame's."""

    @property
    def settings(self) -> list[Setting]:
        """All numbers."""
        tables = [self.shared, *self.each]
        for one in self.slices:
            tables += [one.parameters, *(span.parameters for span in one.spans)]
        return [setting for table in tables for setting in table.values()]


def merged(
    plans: Sequence[Plan], names: Sequence[str], recipe: Recipe
) -> tuple[Plan, tuple[str, ...]]:
    """The frame's plan with the merged tensors and config.json, and notes for the user.

    Args:
        names: What messages call the sources.

    Raises:
        PlanError: sources that are not of one model, or numbers that are missing.
    """
    return _Merge(plans, names, recipe).done()


@final
class _Merge:
    def __init__(self, plans: Sequence[Plan], names: Sequence[str], recipe: Recipe) -> None:
        self._recipe, self._names, self._method = recipe, names, registry.load(recipe.method)
        self._stack = Stack(recipe.slices) if recipe.slices else None
        _check(self._method, recipe, len(plans))
        if any(plan.moment is not None for plan in plans):
            _check_of_moments(self._method)
            self._recipe = recipe = replace(recipe, dtype=None)
        if self._stack is None:
            self._sources = [Layered(plan, {}) for plan in plans]
        else:
            self._sources = self._stack.layered(plans, names)
        self._frame = self._sources[recipe.frame].plan
        self._matches = [self._match(k) for k in range(len(plans))]

    def _match(self, k: int) -> Match | None:
        """A source in the frame; None for the frame itself."""
        if k == self._recipe.frame:
            return None
        words = Words(self._names[k], self._names[self._recipe.frame])
        return frame.match(self._sources[k].plan, self._frame, words)

    def done(self) -> tuple[Plan, tuple[str, ...]]:
        """The merged plan, and notes."""
        notes = [*self._sources[self._recipe.frame].notes]
        targets = dict(self._frame.targets)
        constants = _constants(self._frame)
        for key, (number, place) in self._places().items():
            if self._frame.targets[key].spec.is_float and key not in constants:
                form = self._form(key, number, place)
                targets[key] = targets[key] if form is None else form
        config = self._frame.config
        for k, match in enumerate(self._matches):
            if match is None:
                continue
            plan = self._sources[k].plan
            notes += match.notes
            for key, name in match.added.items():
                targets.setdefault(name, plan.targets[key])
            if config is self._frame.config:
                config = frame.config_of(plan, self._frame, match)
        if self._recipe.dtype is not None:
            targets = {key: self._cast(form) for key, form in targets.items()}
            config = _with_dtype(config, self._recipe.dtype)
        return replace(self._frame, targets=targets, config=config, request=None), tuple(notes)

    def _places(self) -> Mapping[str, tuple[int, Place]]:
        """Key -> the number of its slice (0 without slices), and its place."""
        if self._stack is not None:
            return self._stack.places(self._frame.model)
        known = places.places_of(self._frame, self._recipe.settings)
        return {key: (0, known.get(key) or Place(key)) for key in self._frame.targets}

    def _form(self, key: str, number: int, place: Place) -> LinearForm | None:
        """A tensor of the result; None where a source lacks it, and the frame's stays."""
        recipe, method = self._recipe, self._method
        here = recipe.slices[number] if recipe.slices else None
        base = recipe.base if method.takes_base else None
        parts, base_form, forms = [], None, []
        for k, own in self._taking_part(here):
            form, origin = self._tensor(k, key)
            if form is None:
                return None
            forms.append(form)
            if k == base:
                base_form = form
                continue
            at = replace(place, key=origin)
            each = recipe.each[k] if recipe.each else {}
            nearest: tuple[Settings, ...] = (own, {} if here is None else here.parameters)
            chain = (*nearest, each, recipe.shared)
            parts.append(Part(form, self._numbers("source", chain, at, key, self._names[k])))
        if base is not None and base_form is None:
            raise PlanError(
                f"slices: slice {number} has no layers of the base, {self._names[base]}",
                hint="add it to the slice's sources",
            )
        if not parts:
            made = forms[0]
        else:
            chain = ({} if here is None else here.parameters, recipe.shared)
            shared = self._numbers("shared", chain, place, key, "all")
            made = method.form(key, parts, base_form, shared)
        dtype = self._frame.targets[key].spec.dtype
        if recipe.dtype == PROMOTED:
            dtype = promoted([form.spec.dtype for form in forms])
        return graph.cast(made, dtype)

    def _taking_part(self, here: Slice | None) -> list[tuple[int, Settings]]:
        """The sources of a tensor, with what is said of them in its slice."""
        if here is not None:
            # In the order of the sources: a method may tell the first from the others.
            spans = sorted(here.spans, key=lambda span: span.source)
            return [(span.source, span.parameters) for span in spans]
        return [(k, {}) for k in range(len(self._sources))]

    def _tensor(self, k: int, key: str) -> tuple[LinearForm | None, str]:
        """A source's tensor by the frame's key, and the key that the source has."""
        match, source = self._matches[k], self._sources[k]
        form = self._frame.targets[key] if match is None else match.forms.get(key)
        own = key if match is None else match.pairs.other(key)
        return form, source.origin.get(own, own)

    def _numbers(
        self, scope: str, chain: Sequence[Settings], place: Place, key: str, name: str
    ) -> dict[str, float]:
        """The parameters of a scope at a place.

        Raises:
            PlanError: one is missing.
        """
        numbers = {}
        for parameter, about in self._method.parameters.items():
            if about.scope == scope:
                numbers[parameter] = _number(parameter, about, chain, place, key, name)
        return numbers

    def _cast(self, form: LinearForm) -> LinearForm:
        """A tensor in the dtype that was asked for by name."""
        dtype = self._recipe.dtype
        if dtype is None or dtype == PROMOTED or not form.spec.is_float:
            return form
        return graph.cast(form, dtype)


def promoted(dtypes: Sequence[str]) -> str:
    """The smallest dtype that has all numbers of these: F32 for F16 and BF16."""
    if set(dtypes) == HALVES:
        return "F32"
    return max(dtypes, key=_ORDER.index)


def _number(
    parameter: str, about: Parameter, chain: Sequence[Settings], place: Place, key: str, name: str
) -> float:
    for table in chain:
        setting = table.get(parameter)
        found = None if setting is None else setting.at(place)
        if found is not None:
            return found
    if about.default is None:
        raise PlanError(
            f"{key}: no {parameter} for {name}",
            hint=f"give a number for {parameter}, such as 0.5; rules end with one",
        )
    return about.default


def _check(method: Method, recipe: Recipe, n_sources: int) -> None:
    """Refuse what the method does not take.

    Raises:
        PlanError: naming it.
    """
    tables = [recipe.shared, *recipe.each]
    for one in recipe.slices:
        tables += [one.parameters, *(span.parameters for span in one.spans)]
        numbers = [span.source for span in one.spans]
        wrong = [number for number in numbers if not 0 <= number < n_sources]
        if wrong or len(set(numbers)) < len(numbers):
            problem = f"source {wrong[0]}" if wrong else "one source twice"
            raise PlanError(
                f"slices: {problem} in a slice, expected each of 0 to {n_sources - 1} once at most",
                hint="sources are counted from 0, in the order in which they are given",
            )
        if len({span.end - span.start for span in one.spans}) > 1:
            raise PlanError(
                "slices: a slice whose sources have unequal numbers of layers",
                hint="give each source of a slice as many layers",
            )
    for name in (name for table in tables for name in table):
        if name not in method.parameters:
            raise PlanError(
                f"{method.name} has no parameter {name}",
                hint=f"it has {', '.join(method.parameters)}",
            )
    if method.takes_base and method.needs_base and recipe.base is None:
        raise PlanError(f"{method.name} needs a base", hint="give --base CHECKPOINT")
    taking = [[span.source for span in one.spans] for one in recipe.slices]
    counts = [len({*each} - {recipe.base}) for each in taking or [list(range(n_sources))]]
    most = method.max_sources
    if most is not None and max(counts) > most:
        raise PlanError(
            f"{method.name} takes {most} {'source' if most == 1 else 'sources'}, and there are "
            f"{max(counts)}",
            hint="give --slices, each of as many; or another --method",
        )


def _check_of_moments(method: Method) -> None:
    """Refuse a method that is not one weighted sum: it says nothing of gradients.

    Raises:
        PlanError: naming it.
    """
    if method.name not in _SUMS:
        raise PlanError(
            f"--optimizer: {method.name} is no weighted sum of models, expected one of "
            f"{', '.join(_SUMS)}",
            hint="leave --optimizer out: the optimizer starts fresh",
        )


def _constants(plan: Plan) -> set[str]:
    """Buffers: they are no weights, and no sum is taken of them."""
    try:
        return pairing.constants(plan.model)
    except (ArchitectureError, CheckpointError):
        return set()


def _with_dtype(config: Mapping[str, object] | None, dtype: str) -> Mapping[str, object] | None:
    """config.json that says the dtype, wherever it says one."""
    if config is None or dtype not in CONFIG_DTYPES:
        return config
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    made: dict[str, object] = {**config, **dict.fromkeys(names, CONFIG_DTYPES[dtype])}
    for name, inner in config.items():
        if isinstance(inner, Mapping):
            there = [one for one in ("dtype", "torch_dtype") if one in inner]
            made[name] = {**inner, **dict.fromkeys(there, CONFIG_DTYPES[dtype])}
    return made
