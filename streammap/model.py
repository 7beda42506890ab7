"""A checkpoint as its architecture spec sees it: sizes of the axes, tensors by family.

Each key must match exactly one rule, each dimension must equal its expression, and each layer must
have what the others have; else the checkpoint is refused, with the nearest patterns named.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streammap import architecture as architectures
from streammap import pattern, sizes
from streammap.architecture import Architecture, Dim, Rule
from streammap.errors import ArchitectureError, CheckpointError, some
from streammap.pattern import Expression
from streammap.spec import TensorSpec

_MAX_SIZE = 2**40


@dataclass(frozen=True, slots=True)
class Family:
    """The tensors that one rule describes under one name, over all layers."""

    rule: Rule
    name: str
    """The key with its indices by name: "h.{layer}.ln_1.weight"."""
    members: Mapping[tuple[int, ...], str]
    """Values of the indices -> key."""
    dims: tuple[Dim, ...]

    @property
    def indices(self) -> tuple[str, ...]:
        """Names of the indices in the key."""
        return self.rule.pattern.indices

    def key(self, values: tuple[int, ...]) -> str:
        """The key of the family with these indices, there or not."""
        found = self.name
        for index, value in zip(self.indices, values, strict=True):
            found = found.replace(f"{{{index}}}", str(value))
        return found


@dataclass(frozen=True, slots=True)
class Model:
    """A resolved checkpoint."""

    architecture: Architecture
    sizes: Mapping[str, int]
    """Axis -> size, for each axis whose size is known."""
    families: tuple[Family, ...]
    tied: bool
    """Whether the head shares the embedding's tensor."""

    @property
    def n_layers(self) -> int:
        """Layers, by config.json."""
        return self.sizes[self.architecture.depth_axis]

    def size(self, expression: Expression) -> int:
        """The value of a dimension expression."""
        return self._evaluate(expression)

    def _evaluate(self, expression: Expression) -> int:
        def value_of(name: str) -> int:
            if name in self.architecture.aliases:
                return self._evaluate(self.architecture.aliases[name])
            return self.sizes[name]

        return pattern.evaluate(expression, value_of, _no_calls)


def resolve(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, object] | None,
    *,
    name: str | None = None,
) -> Model:
    """Find the spec that serves a checkpoint and read the checkpoint by it.

    Args:
        specs: Key -> dtype and shape.
        name: The spec to take, where the checkpoint doesn't tell.

    Raises:
        ArchitectureError: no spec serves it.
        CheckpointError: a key that no rule knows, a missing tensor, a shape that does not fit.
    """
    spec = _find(specs, config, name)
    found = sizes.read(spec, config or {}, specs)
    families = _families(spec, specs)
    model = Model(spec, found, families, _is_tied(spec, specs, config or {}))
    _check_shapes(model, specs)
    _check_complete(model)
    return model


def _no_calls(function: str, arguments: tuple[str, ...]) -> int:
    raise ArchitectureError(f"{function}({', '.join(arguments)}) can't stand in a dimension")


def _find(
    specs: Mapping[str, TensorSpec], config: Mapping[str, object] | None, name: str | None
) -> Architecture:
    if name is not None:
        return architectures.load(name)
    model_type = (config or {}).get("model_type")
    if model_type is not None:
        found = architectures.for_model_type(str(model_type))
        if found is None:
            raise ArchitectureError(
                f"no architecture spec serves model_type {str(model_type)[:80]!r}",
                hint=f"there are {', '.join(architectures.names())}; --arch names one",
            )
        return found
    found = architectures.for_keys(specs)
    if found is None:
        what = "config.json has no model_type" if config is not None else "there is no config.json"
        raise ArchitectureError(
            f"{what}, and the keys ({some(list(specs))}) do not tell the architecture",
            hint="give the checkpoint's config.json with --config",
        )
    return found


def _families(spec: Architecture, specs: Mapping[str, TensorSpec]) -> tuple[Family, ...]:
    """Match every key. Candidates are found once per key shape, so the cost is linear in keys."""
    candidates: dict[str, tuple[Rule, ...]] = {}
    found: dict[str, tuple[Rule, dict[tuple[int, ...], str], int]] = {}
    unknown = []
    for key, tensor in specs.items():
        shape = pattern.INDEX.sub("0", key)
        if shape not in candidates:
            candidates[shape] = tuple(r for r in spec.rules if _could_match(r, key, shape))
        matches = [
            (rule, values)
            for rule in candidates[shape]
            if (values := rule.pattern.match(key)) is not None
        ]
        if not matches:
            unknown.append(key)
            continue
        rule, values = matches[0]
        if len(matches) > 1:
            raise ArchitectureError(
                f"{spec.name}.toml: {key} matches {rule.pattern.text} and "
                f"{matches[1][0].pattern.text}"
            )
        name = _family_name(key, rule, values)
        entry = found.setdefault(name, (rule, {}, len(tensor.shape)))
        entry[1][tuple(values[index] for index in rule.pattern.indices)] = key
    if unknown:
        _refuse_unknown(spec, unknown)
    return tuple(
        Family(rule, name, members, _dims(rule, name, rank))
        for name, (rule, members, rank) in found.items()
    )


def _could_match(rule: Rule, key: str, shape: str) -> bool:
    return rule.pattern.match(key) is not None or rule.pattern.match(shape) is not None


def _family_name(key: str, rule: Rule, values: Mapping[str, int]) -> str:
    if not values:
        return key
    found = rule.pattern.regex.fullmatch(key)
    assert found is not None
    name = key
    for index in sorted(values, key=lambda index: -found.start(index)):
        name = f"{name[: found.start(index)]}{{{index}}}{name[found.end(index) :]}"
    return name


def _dims(rule: Rule, name: str, rank: int) -> tuple[Dim, ...]:
    dims = rule.dims_for(rank)
    if dims is None:
        raise CheckpointError(
            f"{name}: {rank} dimensions, expected {len(rule.dims)} "
            f"({', '.join(dim.text for dim in rule.dims)})",
            hint="is this config.json the checkpoint's own?",
        )
    return dims


def _refuse_unknown(spec: Architecture, unknown: list[str]) -> None:
    rendered = {_sample(rule): rule.pattern.text for rule in spec.rules}
    near = difflib.get_close_matches(pattern.INDEX.sub("0", unknown[0]), rendered, n=2, cutoff=0.3)
    told = f"; nearest are {' and '.join(rendered[text] for text in near)}" if near else ""
    raise CheckpointError(
        f"{unknown[0]}: no rule of {spec.name}.toml knows this tensor "
        f"({len(unknown)} such: {some(unknown)}){told}",
        hint="is this the right architecture? --arch names another",
    )


def _sample(rule: Rule) -> str:
    """A pattern's text as a key might look, for the search of near ones."""
    text = re.sub(r"\{\w+:([^|}]*)[^}]*\}", r"\1", rule.pattern.text)
    text = text.replace("{L}", "encoder.layer.0.").replace("{layer}", "0")
    return re.sub(r"\{\w+\}", "", text)


def _is_tied(
    spec: Architecture, specs: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> bool:
    """Whether there is a head that shares the embedding, by the file or by config.json.

    A head tensor beside `tie_word_embeddings: true` is a copy; it is treated as tied, which is
    right whether the loader ties it or not.
    """
    head = spec.head
    if head is None or not any(head.norm.match(key) is not None for key in specs):
        return False
    classes = config.get("architectures")
    if isinstance(classes, list) and not head.is_in(str(name) for name in classes):
        return False
    has_tensor = any(head.head.match(key) is not None for key in specs)
    return not has_tensor or config.get("tie_word_embeddings", True) is not False


def _check_shapes(model: Model, specs: Mapping[str, TensorSpec]) -> None:
    for family in model.families:
        expected = tuple(_expected(model, family, dim) for dim in family.dims)
        for key in family.members.values():
            shape = specs[key].shape
            if len(shape) == len(expected) and all(
                size in (None, n) for size, n in zip(expected, shape, strict=True)
            ):
                continue
            text = ", ".join(dim.text for dim in family.dims)
            wanted = ", ".join("_" if size is None else str(size) for size in expected)
            raise CheckpointError(
                f"{key}: shape {list(shape)} is not ({text}) = [{wanted}]",
                hint="is this config.json the checkpoint's own?",
            )


def _expected(model: Model, family: Family, dim: Dim) -> int | None:
    if dim.expression is None:
        return None
    try:
        return model.size(dim.expression)
    except KeyError as missing:
        axis = model.architecture.axes.get(missing.args[0])
        fields = " or ".join(axis.fields) if axis is not None else str(missing)
        raise CheckpointError(
            f"config.json: no {fields}, which {family.name} needs",
            hint="give the checkpoint's own config.json with --config",
        ) from missing


def _check_complete(model: Model) -> None:
    depth, n_layers = model.architecture.depth_axis, model.n_layers
    missing: list[str] = []
    surplus: list[str] = []
    n_missing = 0
    for family in model.families:
        if family.indices != (depth,):
            continue
        lacking = ((i,) for i in range(n_layers) if (i,) not in family.members)
        missing += [family.key(values) for values in itertools.islice(lacking, 3)]
        n_missing += n_layers - sum(i < n_layers for (i,) in family.members)
        surplus += [key for (i,), key in family.members.items() if i >= n_layers]
    if surplus:
        raise CheckpointError(
            f"{surplus[0]}: config.json says {n_layers} layers (0 to {n_layers - 1}); "
            f"{len(surplus)} tensors are of later ones",
            hint="is this config.json the checkpoint's own?",
        )
    for required in model.architecture.required:
        if not any(required.match(k) is not None for f in model.families for k in _some(f)):
            missing.append(_sample(Rule(required, "tensor")))
            n_missing += 1
    if missing:
        told = ", ".join(missing[:3])
        if n_missing > 3:
            told += f" and {n_missing - 3} more"
        raise CheckpointError(
            f"{missing[0]}: missing ({n_missing} tensors: {told})",
            hint="download or save the checkpoint again",
        )


def _some(family: Family) -> Iterable[str]:
    """One key of a family: enough to know which rule it is."""
    return (next(iter(family.members.values())),)
