"""KeepQuantised: tensors that are copied keep the codes and scales that they are stored as."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from streammap.errors import PlanError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.codecs import quantization_config
from streammap.operators.declare import Operator, declared
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef, Term
from streammap.planning.plan import Plan, Step

_LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
"""Fields of a quantization_config that name modules which are not quantised."""
_HINT = "leave keep-quantised out: the tensors are then written as they are read, decoded"
Places = Mapping[str, tuple[str, ...]]
"""Module of a source -> where it stands in the result."""


@final
@declared
class KeepQuantised(Operator):
    """Keep quantised tensors as they are stored: codes, scales and quantization_config.

    Possible where each of them is copied, as in a model of fewer layers or of repeated ones. It
    stands last: nothing can be computed with codes.
    """

    examples = ("keep-quantised fp8/ copy/",)

    def plan(self, source: Plan) -> Plan:
        """The plan in which quantised tensors are copied as they are stored.

        Raises:
            PlanError: one of them is computed with, or two sources are quantised in two ways.
        """
        quantised = [one for one in source.sources if one.stored is not None]
        if not quantised or source.moment is not None:
            step = Step(self.name, {}, "bit-exact", "no tensor is quantised")
            return replace(source, steps=(*source.steps, step), request=None)
        table = _table(quantised)
        moves = _Moves()
        targets: dict[str, LinearForm] = {}
        for key, form in source.targets.items():
            targets.update(_stored(key, form))
            if form.copied is not None and isinstance(form.copied.source, Checkpoint):
                moves.add(form.copied, key)
        for one in quantised:
            targets.update(_beside(one, moves.places(one, _modules_beside(one))))
        config, notes = source.config, tuple[str, ...]()
        side = source.side
        if config is not None and table is not None and side is not None:
            listed = [name for field_ in _LISTS for name in _names(table.get(field_))]
            places = moves.places(quantised[0], listed)
            was = (side.stored or side).config or {}
            config = _with_table(config, was, _renamed(table, places, quantised[0]))
            notes = tuple(_notes(listed, moves))
        step = Step(self.name, {}, "bit-exact", "quantised tensors keep codes and scales", notes)
        return replace(
            source,
            targets=targets,
            config=config,
            sources=tuple(one.stored or one for one in source.sources),
            side=None if side is None else side.stored or side,
            steps=(*source.steps, step),
            request=None,
        )


def _table(quantised: Sequence[Checkpoint]) -> Mapping[str, object] | None:
    """The quantization_config of all sources."""
    tables = [quantization_config.find((one.stored or one).config or {}) for one in quantised]
    for one, table in zip(quantised, tables, strict=True):
        if table != tables[0]:
            raise PlanError(
                f"keep-quantised: {quantised[0].name} and {one.name} are quantised in two ways, "
                "expected one quantization_config",
                hint=_HINT,
            )
    return tables[0]


def _stored(key: str, form: LinearForm) -> Iterator[tuple[str, LinearForm]]:
    """The tensors that a tensor of the result is stored as."""
    ref = form.copied
    if ref is not None and isinstance(ref.source, Checkpoint) and ref.key in ref.source.parts_of:
        stored = ref.source.stored
        assert stored is not None
        old, new = ref.key.removesuffix(".weight"), key.removesuffix(".weight")
        for part in ref.source.parts_of[ref.key]:
            yield new + part.removeprefix(old), graph.load(stored, part)
        return
    for load in _read(form):
        if isinstance(load.source, Checkpoint) and load.key in load.source.parts_of:
            raise PlanError(
                f"keep-quantised: {key} is computed from {load.key}, which is quantised: expected "
                "a copy",
                hint=_HINT,
            )
    terms = tuple(
        Term(term.maps, tuple((c, _of_stored(load)) for c, load in term.blend))
        for term in form.terms
    )
    yield key, replace(form, terms=terms)


def _read(form: LinearForm) -> Iterator[TensorRef]:
    """What a tensor is computed from, derived tensors' own sources included."""
    for load in form.loads():
        yield load
        if isinstance(load.source, graph.Derived):
            for inner in load.source.inputs:
                yield from _read(inner)


def _of_stored(ref: TensorRef) -> TensorRef:
    """The same tensor of the checkpoint as it is stored."""
    if isinstance(ref.source, Checkpoint) and ref.source.stored is not None:
        return replace(ref, source=ref.source.stored)
    return ref


@dataclass(frozen=True, slots=True)
class _Moves:
    """The tensors that are copied: from where, and to where."""

    keys: list[tuple[Checkpoint, str, str]] = field(default_factory=list)

    def add(self, ref: TensorRef, key: str) -> None:
        """Take note of a copy."""
        if isinstance(ref.source, Checkpoint):
            self.keys.append((ref.source, ref.key, key))

    @property
    def renumbers(self) -> bool:
        """Whether a tensor has another name in the result."""
        return any(old != new for _, old, new in self.keys)

    def places(self, source: Checkpoint, modules: Sequence[str]) -> Places:
        """Where modules stand in the result: where the tensors below them do."""
        found: dict[str, dict[str, None]] = {module: {} for module in modules}
        for of, old, new in self.keys:
            end = old.rfind(".") if of is source else -1
            while end > 0:
                module, rest = old[:end], old[end:]
                if module in found and new.endswith(rest):
                    found[module][new[: -len(rest)]] = None
                end = old.rfind(".", 0, end)
        return {module: tuple(places) for module, places in found.items()}


def _left(source: Checkpoint) -> list[str]:
    """Stored tensors that are neither read nor parts of others: ranges of activations, shapes."""
    assert source.stored is not None
    parts = {part for parts in source.parts_of.values() for part in parts}
    return [key for key in source.stored.slots if key not in parts and key not in source.slots]


def _modules_beside(source: Checkpoint) -> list[str]:
    """The modules of what is left, and of quantised tensors whose own name is not `weight`."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in _left(source)))


def _beside(source: Checkpoint, places: Places) -> Iterator[tuple[str, LinearForm]]:
    """What is left goes along with the module that it is in."""
    assert source.stored is not None
    for key in _left(source):
        module, _, name = key.rpartition(".")
        for place in places[module]:
            yield f"{place}.{name}", graph.load(source.stored, key)


def _renamed(table: Mapping[str, object], places: Places, source: Checkpoint) -> dict[str, object]:
    """A quantization_config whose lists name the modules of the result."""
    assert source.stored is not None
    there = {key[:end] for key in source.slots for end in _ends(key)}
    renamed = dict(table)
    for name in _LISTS:
        if isinstance(value := table.get(name), list):
            modules = (
                places.get(one, (one,)) if isinstance(one, str) and one in there else (one,)
                for one in value
            )
            renamed[name] = list(dict.fromkeys(one for ones in modules for one in ones))
    return renamed


def _ends(key: str) -> Iterator[int]:
    end = key.rfind(".")
    while end > 0:
        yield end
        end = key.rfind(".", 0, end)


def _names(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _notes(listed: Sequence[str], moves: _Moves) -> Iterator[str]:
    """Patterns with numbers that may be those of layers can't be renamed."""
    patterns = [name for name in listed if name.startswith("re:") and any(map(str.isdigit, name))]
    if patterns and moves.renumbers:
        yield (
            f"config.json: quantization_config names modules by {some(patterns)}, which stays: "
            "layers have other numbers now"
        )


def _with_table(
    config: Mapping[str, object], was: Mapping[str, object], table: Mapping[str, object]
) -> dict[str, object]:
    """The config with a quantization_config wherever the source's has one."""
    out: dict[str, object] = {}
    for name, value in {**was, **config}.items():  # the source's order
        before = was.get(name)
        if name in quantization_config.FIELDS and isinstance(before, Mapping):
            out[name] = table
        elif name in config:
            is_table = isinstance(value, Mapping) and isinstance(before, Mapping)
            out[name] = _with_table(value, before, table) if is_table else value  # type: ignore[arg-type]
    return out
