"""A model with adapters merged: each weight W becomes W + sum of scale * B A, rounded once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.io.dtypes import TensorSpec
from streammap.planning import graph, planner
from streammap.planning.adapters import layers, products, settings
from streammap.planning.adapters.layers import Content
from streammap.planning.adapters.places import Places
from streammap.planning.adapters.products import Found
from streammap.planning.adapters.settings import Settings
from streammap.planning.derived.low_rank import LowRank
from streammap.planning.derived.replaced_rows import ReplacedRows
from streammap.planning.derived.row_norms import RowsOfLength
from streammap.planning.graph import LinearForm
from streammap.planning.maps import BlockMap
from streammap.planning.plan import Plan


@final
@dataclass(frozen=True, slots=True)
class _Adapter:
    """One adapter, read."""

    plan: Plan
    settings: Settings
    content: Content
    scale: float

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def names(self) -> Iterable[str]:
        """The tensors that it is for, by its own names."""
        yield from (f"{layer.module}.weight" for layer in self.content.layers)
        yield from self.content.whole


def merge(model: Plan, adapters: Sequence[tuple[Plan, float]]) -> tuple[Plan, tuple[str, ...]]:
    """The model with adapters merged, in their order, and notes; no step is added.

    Args:
        adapters: Each with what its scale is multiplied by.

    Raises:
        PlanError: a tensor that the model does not have, or has in another shape.
        CheckpointError: something else than a LoRA.
    """
    opened = [_opened(plan, scale) for plan, scale in adapters]
    notes = [note for one in opened for note in _base_notes(one, model)]
    model, more = _untied(model, opened)
    places, targets = Places(model), dict(model.targets)
    notes += more
    whole = _replaced(model, opened, places)
    targets |= {key: form for key, (form, _) in whole.items()}
    for name in dict.fromkeys(name for _, name in whole.values()):
        keys = [key for key, (_, other) in whole.items() if other == name]
        notes.append(f"{some(keys)}: whole in the adapter {name}, and taken as they are there")
    found = [(one, each) for one in opened for each in _products(one, model, places)]
    by_key: dict[str, list[tuple[_Adapter, Found]]] = {}
    for one, each in found:
        by_key.setdefault(each.key, []).append((one, each))
    for key, group in by_key.items():
        targets[key] = _merged(key, targets[key], group)
    for one in opened:
        _add_biases(one, targets, places, model)
        _set_tokens(one, targets, places, model)
    sources = tuple(dict.fromkeys((*model.sources, *(s for p, _ in adapters for s in p.sources))))
    return replace(model, targets=targets, sources=sources, request=None), tuple(notes)


def _opened(plan: Plan, scale: float) -> _Adapter:
    name = plan.sources[0].name
    if plan.config is None:
        raise CheckpointError(f"{name}: no adapter_config.json", hint="name the adapter's folder")
    read = settings.read(plan.config, name=name)
    return _Adapter(plan, read, layers.sort(plan.targets, adapter=name), scale)


def _base_notes(one: _Adapter, model: Plan) -> Iterable[str]:
    """A note where the adapter names another model than the one it is put on."""
    base = one.settings.base
    if base is None or model.side is None:
        return
    last = base.rstrip("/").rpartition("/")[2]
    names = {model.side.name, *model.side.origin.values()}
    if base not in names and last not in {name.rpartition("/")[2] for name in names}:
        yield f"the adapter {one.name} was trained for {base}, not for {model.side.name}"


def _untied(model: Plan, opened: Sequence[_Adapter]) -> tuple[Plan, tuple[str, ...]]:
    """The model, with a head of its own where adapters change one of two that are tied.

    Raises:
        PlanError: the head can't have a tensor of its own, or is to stay tied.
    """
    try:
        resolved = model.model
    except (ArchitectureError, CheckpointError):
        return model, ()
    changed = [
        (one, name)
        for one in opened
        for name in one.names
        for tied in resolved.tied_heads
        if tied.is_head(name) or tied.is_embedding(name)
    ]
    if not changed:
        return model, ()
    one, name = changed[0]
    if any(each.settings.ties for each, _ in changed):
        raise PlanError(
            f"{one.name}: {name} is tied to another tensor of the model, and ensure_weight_tying "
            "wants them to stay one",
            hint="merge it with peft (merge_and_unload)",
        )
    untied, notes = planner.untie(model)
    told = f"{name} is tied, and the adapter {one.name} changes it alone: the head gets a tensor"
    return untied, (f"{told} of its own", *notes)


def _replaced(
    model: Plan, opened: Sequence[_Adapter], places: Places
) -> Mapping[str, tuple[LinearForm, str]]:
    """Model's key -> the tensor that an adapter has for it, and that adapter's name."""
    found: dict[str, tuple[LinearForm, str]] = {}
    for one in opened:
        for name, stored in one.content.whole.items():
            form, key = one.plan.targets[stored], places.find(name)
            if key is None:
                raise products.unknown(f"{one.name}: {stored}", name, model, whole=True)
            if key in found:
                raise PlanError(
                    f"{key}: both {found[key][1]} and {one.name} have all of it, expected one",
                    hint="merge one of the two alone, and remove the tensor from the other",
                )
            spec = model.targets[key].spec
            if form.spec.shape != spec.shape:
                raise PlanError(
                    f"{one.name}: {stored} is {list(form.spec.shape)}, {key} is {list(spec.shape)}",
                    hint="if tokens were added, give the model as many rows first",
                )
            if form.spec.is_float != spec.is_float:
                raise PlanError(f"{one.name}: {stored} is {form.spec.dtype}, {key} {spec.dtype}")
            found[key] = graph.combine([(1.0, form)], dtype=spec.dtype), one.name
    return found


def _products(one: _Adapter, model: Plan, places: Places) -> Iterable[Found]:
    for layer in one.content.layers:
        yield from products.of_layer(layer, one.plan, one.settings, model, places, scale=one.scale)


def _merged(key: str, weight: LinearForm, group: Sequence[tuple[_Adapter, Found]]) -> LinearForm:
    """A weight with its products."""
    spec = weight.spec
    if not spec.is_float:
        raise PlanError(
            f"{key}: {spec.dtype}, which a product can't be added to",
            hint="dequantise the model first",
        )
    precise = spec.dtype in ("F32", "F64")
    shape = spec.shape
    is_stack = group[0][1].is_stack
    n_rows = shape[1] if is_stack else shape[0]
    n_columns = math.prod(shape[2:] if is_stack else shape[1:])
    wide = TensorSpec("F64" if spec.dtype == "F64" else "F32", shape)
    made = LowRank(wide, n_rows, n_columns, tuple(f.product for _, f in group), precise)
    parts = [(1.0, weight), (1.0, graph.derive(made))]
    of_dora = [(one, found.magnitude) for one, found in group if found.magnitude is not None]
    if not of_dora:
        return graph.combine(parts, dtype=spec.dtype)
    one, magnitude = of_dora[0]
    lengths = one.plan.targets[magnitude]
    if len({id(each) for each, _ in group}) > 1:
        raise PlanError(
            f"{key}: {some(sorted({each.name for each, _ in group}))} change it, one of them by "
            "DoRA, which is not additive",
            hint="merge the DoRA adapter into the model first, and the others into the result",
        )
    if lengths.spec.n_elements != shape[0]:
        raise PlanError(
            f"{one.name}: {magnitude} is {list(lengths.spec.shape)}, {key} has {shape[0]} rows",
            hint="is it an adapter for this model?",
        )
    whole = graph.combine(parts, dtype=wide.dtype)
    return graph.derive(RowsOfLength(whole, lengths), dtype=spec.dtype)


def _add_biases(one: _Adapter, targets: dict[str, LinearForm], places: Places, model: Plan) -> None:
    """Add what lora_bias trains beside B."""
    for layer in one.content.layers:
        stored = layer.parts.get("B.bias")
        if stored is None:
            continue
        key = places.find(f"{layer.module}.bias")
        if key is None:
            raise products.unknown(f"{one.name}: {stored}", f"{layer.module}.bias", model)
        form, bias = one.plan.targets[stored], targets[key]
        if form.spec.shape != bias.spec.shape:
            raise PlanError(
                f"{one.name}: {stored} is {list(form.spec.shape)}, {key} {list(bias.spec.shape)}",
                hint="is it an adapter for this model?",
            )
        scale = one.settings.scale_of(layer.module) * one.scale
        targets[key] = graph.combine([(1.0, bias), (scale, form)], dtype=bias.spec.dtype)


def _set_tokens(one: _Adapter, targets: dict[str, LinearForm], places: Places, model: Plan) -> None:
    """Replace the rows of an embedding that are trained; a head that is tied to it has them too."""
    for module, stored in one.content.tokens.items():
        rows, key = one.plan.targets[stored], places.find(f"{module}.weight")
        if key is None:
            raise products.unknown(f"{one.name}: {stored}", f"{module}.weight", model)
        tokens, form = one.settings.tokens_of(module), targets[key]
        if tokens is None or (len(tokens), *form.spec.shape[1:]) != rows.spec.shape:
            told = "none" if tokens is None else len(tokens)
            raise PlanError(
                f"{one.name}: {stored} is {list(rows.spec.shape)} for {told} tokens of "
                f"trainable_token_indices, {key} is {list(form.spec.shape)}",
                hint="copy the adapter_config.json that was saved with these weights",
            )
        beyond = [n for n in tokens if not 0 <= n < form.spec.shape[0]]
        if beyond or len(set(tokens)) < len(tokens) or len(form.spec.shape) != 2:
            raise PlanError(
                f"{one.name}: trainable_token_indices: {some(beyond or tokens)}: expected each "
                f"once, below {form.spec.shape[0]}, the rows of {key}",
                hint="if tokens were added, give the model as many rows first",
            )
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        sort = BlockMap(tuple(((i, 1.0),) for i in order), len(tokens))
        ascending = graph.combine(
            [(1.0, graph.map_dims(rows, [sort, None]))], dtype=form.spec.dtype
        )
        made = ReplacedRows(form, ascending, tuple(sorted(tokens)))
        targets[key] = graph.derive(made)
