"""The products that an adapter adds to tensors of a model, with each factor's place in its file.

A is [rank, in] and B [out, rank], a convolution's with its kernel behind. For a stack of E experts,
A is [E * rank, in], expert by expert, and B [out, rank * E], rank by rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

from streammap.errors import CheckpointError, PlanError, some
from streammap.io.dtypes import TensorSpec
from streammap.planning.adapters.layers import Layer
from streammap.planning.adapters.places import Places
from streammap.planning.adapters.settings import Settings
from streammap.planning.derived.low_rank import Factor, Product
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan

_STACK_RANK = 3
_FUSED = ("gate_up_proj", "down_proj")


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A product for a tensor of the model, and what else its layer says of that."""

    key: str
    product: Product
    magnitude: str | None = None
    """The adapter's key of DoRA's row lengths."""
    is_stack: bool = False
    """Whether the tensor is a stack of matrices."""


@final
@dataclass(frozen=True, slots=True)
class _Pair:
    """The two matrices of a layer."""

    layer: Layer
    a: LinearForm
    b: LinearForm
    where: str
    """Of messages: "adapter: key of A [shape] and B [shape]"."""

    @property
    def n_in(self) -> int:
        """Numbers that one output reads: inputs, or rows of an embedding."""
        return math.prod(self.a.spec.shape[1:])

    @property
    def n_out(self) -> int:
        return self.b.spec.shape[0]


def of_layer(
    layer: Layer, adapter: Plan, settings: Settings, model: Plan, places: Places, *, scale: float
) -> Iterator[Found]:
    """The products of one layer.

    Args:
        adapter: The adapter's tensors as they are.
        scale: What the adapter's own scale is multiplied by.

    Raises:
        PlanError: the model has no such tensor, or one of another shape.
        CheckpointError: matrices that are not of the rank that adapter_config.json says.
    """
    pair = _pair(layer, adapter, settings)
    key = places.find(f"{layer.module}.weight") if not layer.depth else None
    if key is not None:
        yield _of_weight(pair, settings, model.targets[key].spec, key, places, scale)
        return
    slab = places.slab(layer.module)
    if slab is not None:
        spec = model.targets[slab.key].spec
        if len(spec.shape) != _STACK_RANK or slab.matrix >= spec.shape[0]:
            raise unknown(pair.where, f"{layer.module}.weight", model)
        rank, strength = _strength(pair, settings, layer.module, 1)
        rows = spec.shape[1] // (1 if slab.half is None else 2)
        _check_shape(pair, slab.key, (rows, spec.shape[2]), (pair.n_out, pair.n_in))
        if "magnitude_vector" in layer.parts:
            raise _no_dora(pair, "of one expert, for a model whose experts are one tensor")
        if places.is_transposed(slab.key):
            raise PlanError(
                f"{pair.where}: for a model that stores {slab.key} transposed",
                hint="save the adapter again with the transformers that loads this model",
            )
        left, right = _of_out(pair, rank), _of_in(pair, rank)
        row = (slab.half or 0) * rows
        product = Product(left, right, strength * scale, slab.matrix, row)
        yield Found(slab.key, product, is_stack=True)
        return
    yield from _of_parameter(pair, settings, model, places, scale)


def _pair(layer: Layer, adapter: Plan, settings: Settings) -> _Pair:
    """The matrices of a layer, which must be numbers of two dimensions or more."""
    first, second = layer.factors
    a, b = adapter.targets[first], adapter.targets[second]
    shapes = f"{list(a.spec.shape)}, B {list(b.spec.shape)}"
    where = f"{settings.name}: {first} {shapes}"
    if min(len(a.spec.shape), len(b.spec.shape)) < 2 or not a.spec.n_elements * b.spec.n_elements:
        raise CheckpointError(
            f"{where}: expected two matrices",
            hint="parts of sharded training were saved: gather them before saving",
        )
    if not (a.spec.is_float and b.spec.is_float):
        raise CheckpointError(f"{where}: {a.spec.dtype} and {b.spec.dtype}, expected floats")
    if math.prod(b.spec.shape[2:]) != 1:
        raise CheckpointError(f"{where}: B has a kernel, expected one of size 1")
    return _Pair(layer, a, b, where)


def _strength(pair: _Pair, settings: Settings, name: str, n: int) -> tuple[int, float]:
    """The rank, and what the product is multiplied by.

    Args:
        name: What patterns of ranks are compared with.
        n: Matrices that are stacked in A and B.
    """
    rank = settings.rank_of(name)
    found = pair.a.spec.shape[0], pair.b.spec.shape[1]
    if found != (rank * n, rank * n):
        of_experts = f" times {n} experts" if n > 1 else ""
        raise CheckpointError(
            f"{pair.where}: ranks {found[0]} and {found[1]}, but adapter_config.json says "
            f"{rank}{of_experts}",
            hint="copy the adapter_config.json that was saved with these weights",
        )
    return rank, settings.scale_of(name)


def _of_weight(
    pair: _Pair, settings: Settings, spec: TensorSpec, key: str, places: Places, scale: float
) -> Found:
    """The product for the weight of a module."""
    layer = pair.layer
    rank, strength = _strength(pair, settings, layer.module, 1)
    rows, columns = spec.shape[0] if spec.shape else 0, math.prod(spec.shape[1:])
    upright, turned = (pair.n_out, pair.n_in), (pair.n_in, pair.n_out)
    is_turned = layer.is_embedding
    if not is_turned and upright == turned and len(spec.shape) == 2:
        told = places.is_transposed(key)
        is_turned = settings.fan_in_fan_out if told is None else told
    elif not is_turned and len(spec.shape) == 2 and (rows, columns) == turned:
        is_turned = True
    _check_shape(pair, key, spec.shape, turned if is_turned else upright)
    magnitude = layer.parts.get("magnitude_vector")
    if magnitude is not None and (is_turned or len(spec.shape) > 2):
        what = "of an embedding" if layer.is_embedding else "of a weight with a row for each input"
        raise _no_dora(pair, what if is_turned else "of a convolution")
    left, right = _of_out(pair, rank), _of_in(pair, rank)
    if is_turned:
        left, right = right, left
    return Found(key, Product(left, right, strength * scale), magnitude)


def _of_parameter(
    pair: _Pair, settings: Settings, model: Plan, places: Places, scale: float
) -> Iterator[Found]:
    """The products for a parameter of experts: fused in the model, or expert by expert."""
    module = pair.layer.module
    if "magnitude_vector" in pair.layer.parts:
        raise _no_dora(pair, "of experts that are one tensor")
    stacks = {
        key: model.targets[key].spec
        for key in places.parameters(module)
        if len(model.targets[key].spec.shape) == _STACK_RANK
    }
    names = settings.parameters or _FUSED
    wanted = {
        key: spec
        for key, spec in stacks.items()
        if any(key.endswith(name.rpartition(".")[2]) for name in names)
    }
    fitting = [key for key, spec in wanted.items() if _orders(pair, spec)]
    if fitting:
        key = fitting[0] if len(fitting) == 1 else _by_depth(pair, settings, fitting)
        yield from _of_stack(pair, settings, key, stacks[key], places, scale)
        return
    if wanted:
        told = [f"{key} {list(spec.shape)}" for key, spec in wanted.items()]
        raise PlanError(
            f"{pair.where}: fits none of {some(told)}",
            hint="is it an adapter for this model?",
        )
    yield from _of_experts(pair, settings, model, places, scale)


def _orders(pair: _Pair, spec: TensorSpec) -> tuple[bool, ...]:
    """Orders in which a stack fits: False for [E, out, in], True for [E, in, out]."""
    n, one, two = spec.shape
    if pair.a.spec.shape[0] % n:
        return ()
    sizes = pair.n_in, pair.n_out
    return tuple(
        order for order, found in ((False, (two, one)), (True, (one, two))) if found == sizes
    )


def _by_depth(pair: _Pair, settings: Settings, fitting: Sequence[str]) -> str:
    """Of parameters of one module and shape, the one of a layer: the first is the innermost."""
    depth = len(fitting) - 1 - pair.layer.depth
    if not 0 <= depth < len(fitting) or len(settings.parameters) == 1:
        raise PlanError(
            f"{pair.where}: fits {some(fitting)}, and its key does not tell which",
            hint="save the adapter with target_parameters that name one of them",
        )
    return fitting[depth]


def _of_stack(
    pair: _Pair, settings: Settings, key: str, spec: TensorSpec, places: Places, scale: float
) -> Iterator[Found]:
    """A product for each matrix of a stack."""
    orders, n = _orders(pair, spec), spec.shape[0]
    is_turned = orders[0]
    if len(orders) > 1:
        told = places.is_transposed(key)
        if told is None:
            raise PlanError(
                f"{pair.where}: {key} {list(spec.shape)} is square, and no spec says which of its "
                "dimensions is the input",
                hint="give the model's config.json with --config",
            )
        is_turned = told
    rank, strength = _strength(pair, settings, _parameter_name(pair, key), n)
    for expert in range(n):
        left, right = _of_out(pair, rank, n, expert), _of_in(pair, rank, expert)
        if is_turned:
            left, right = right, left
        yield Found(key, Product(left, right, strength * scale, expert), is_stack=True)


def _of_experts(
    pair: _Pair, settings: Settings, model: Plan, places: Places, scale: float
) -> Iterator[Found]:
    """A product for each module of an expert, of an adapter for the parameter of all of them."""
    module = pair.layer.module
    choices: dict[str, list[tuple[int, int | None, str]]] = {}
    for name in _FUSED:
        parts = places.experts(module, name)
        if not parts:
            continue
        n, out, n_in = _fused_shape(parts, model)
        if (out, n_in) == (pair.n_out, pair.n_in) and not pair.a.spec.shape[0] % n:
            choices[name] = parts
    targeted = [name.rpartition(".")[2] for name in settings.parameters]
    names = [name for name in choices if not targeted or name in targeted]
    if not names:
        raise unknown(pair.where, f"{module}.weight", model)
    name = names[0] if len(names) == 1 else _by_depth(pair, settings, names)
    n, out, _ = _fused_shape(choices[name], model)
    rank, strength = _strength(pair, settings, f"{module}.{name}", n)
    for expert, half, key in choices[name]:
        left, right = _of_out(pair, rank, n, expert), _of_in(pair, rank, expert)
        if half is not None:
            rows = out // 2
            left = replace(left, n=rows, first=left.first + half * rows * left.step)
        yield Found(key, Product(left, right, strength * scale))


def _fused_shape(parts: Sequence[tuple[int, int | None, str]], model: Plan) -> tuple[int, int, int]:
    """Experts, outputs and inputs of the parameter that modules of experts are parts of."""
    out, n_in = model.targets[parts[0][2]].spec.shape
    halves = len({half for _, half, _ in parts})
    return len({expert for expert, _, _ in parts}), out * halves, n_in


def _parameter_name(pair: _Pair, key: str) -> str:
    return f"{pair.layer.module}.{key.rpartition('.')[2]}"


def _of_out(pair: _Pair, rank: int, n: int = 1, expert: int = 0) -> Factor:
    """B's columns of one expert [out, rank]."""
    return Factor(pair.b, pair.n_out, rank, expert, rank * n, n)


def _of_in(pair: _Pair, rank: int, expert: int = 0) -> Factor:
    """A's rows of one expert, turned [in, rank]."""
    return Factor(pair.a, pair.n_in, rank, expert * rank * pair.n_in, 1, pair.n_in)


def _check_shape(pair: _Pair, key: str, shape: tuple[int, ...], product: tuple[int, int]) -> None:
    if (shape[0] if shape else 0, math.prod(shape[1:])) != product:
        raise PlanError(
            f"{pair.where}: its product is {list(product)}, {key} is {list(shape)}",
            hint="is it an adapter for this model, and of this size?",
        )


def _no_dora(pair: _Pair, what: str) -> PlanError:
    return PlanError(
        f"{pair.where}: DoRA {what}, which is not merged",
        hint="merge it with peft (merge_and_unload)",
    )


def unknown(where: str, name: str, model: Plan, *, whole: bool = False) -> PlanError:
    """The error for an adapter's tensor that the model has no place for.

    Args:
        whole: Whether it would be a tensor of the result as it is.
    """
    import difflib

    near = difflib.get_close_matches(name, model.targets, n=1, cutoff=0.4)
    told = near[0] if near else some(list(model.targets))
    return PlanError(
        f"{where}: the model has no {name}; {'nearest is' if near else 'it has'} {told}",
        hint="was it trained for another class, one with another head? Save the model in that "
        "class first"
        if whole
        else "is it an adapter for this model?",
    )
