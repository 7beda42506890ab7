"""A checkpoint read by its spec: which one serves it, and which tensors are of which family.

Each key must match exactly one rule, each dimension must equal its expression, and layers of one
kind must have the same tensors; else the checkpoint is refused, with the nearest patterns named.
"""

from collections.abc import Iterable, Mapping, Sequence

from streammap.architectures import (
    adapters,
    axis_sizes,
    config_fields,
    key_pattern,
    layer_rules,
    model_checks,
    quantization,
    registry,
)
from streammap.architectures.key_pattern import first_match
from streammap.architectures.model import Family, Model, TiedHead
from streammap.architectures.schema import Architecture, Depth, DimSpec, LMHead, TensorRule
from streammap.errors import ArchitectureError, CheckpointError, some
from streammap.io.dtypes import TensorSpec


def resolve(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, object] | None,
    *,
    name: str | None = None,
) -> Model:
    """Find the spec that serves a checkpoint and read the checkpoint by it.

    Args:
        specs: Key -> dtype and shape.
        name: The spec to take, where the checkpoint doesn't tell: a name, or a file (*.toml).

    Raises:
        ArchitectureError: no spec serves it.
        CheckpointError: a key that no rule knows, a missing tensor, a shape that does not fit, a
            quantised checkpoint, an adapter that is not merged.
    """
    quantization.check(specs, config or {})
    adapters.check(specs.keys())
    spec = find(specs, config, name)
    if spec.unserved:
        raise ArchitectureError(
            f"config.json: {spec.unserved}, which no spec can say",
            hint="it can't be resized; interpolate, diff and inspect --health need no spec",
        )
    sizes = axis_sizes.read(spec, config or {}, specs)
    families = _families(spec, specs, config or {}, sizes)
    heads = tuple(
        tied for head in spec.heads if (tied := _tied(head, specs, config or {})) is not None
    )
    model = Model(spec, config or {}, sizes, families, heads)
    model_checks.check_shapes(model, specs)
    model_checks.check_complete(model)
    return model


def find(
    specs: Mapping[str, TensorSpec], config: Mapping[str, object] | None, name: str | None
) -> Architecture:
    """The spec that serves a checkpoint.

    Raises:
        ArchitectureError: there is none; the hint says how to get one.
    """
    fields = config or {}
    if name is not None:
        return registry.load(name, fields)
    model_type = fields.get("model_type")
    if model_type is not None:
        spec = registry.for_model_type(str(model_type), fields)
        if spec is None:
            raise ArchitectureError(
                f"no architecture spec serves model_type {str(model_type)[:80]!r}",
                hint="`streammap spec infer CHECKPOINT > mine.toml` writes one (needs "
                "transformers), --arch mine.toml uses it; `streammap architectures` lists all",
            )
        return spec
    spec = registry.for_keys(specs, fields)
    if spec is None:
        what = "config.json has no model_type" if config is not None else "there is no config.json"
        raise ArchitectureError(
            f"{what}, and the keys ({some(list(specs))}) do not tell the architecture",
            hint="give the checkpoint's config.json with --config",
        )
    return spec


def _families(
    spec: Architecture,
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, object],
    sizes: Mapping[str, int],
) -> tuple[Family, ...]:
    """Match every key. Candidates are found once per key shape, so the cost is linear in keys."""
    conditions = {condition for rule in spec.rules for condition in rule.when}
    listed = {
        (c.axis, c.field): layer_rules.entries(
            spec.depth.get(c.axis, Depth()), config, c.field, sizes.get(c.axis, 0)
        )
        for c in conditions
    }
    candidates: dict[str, tuple[TensorRule, ...]] = {}
    groups: dict[tuple[int, str], tuple[TensorRule, dict[tuple[int, ...], str], int]] = {}
    unknown = []
    for key, tensor in specs.items():
        shape = key_pattern.INDEX.sub("0", key)
        if shape not in candidates:
            candidates[shape] = tuple(r for r in spec.rules if r.pattern.loose.fullmatch(shape))
        matches = [
            (rule, values)
            for rule in candidates[shape]
            if (values := rule.pattern.match(key)) is not None and _applies(rule, values, listed)
        ]
        if not matches:
            unknown.append(key)
            continue
        lowest = min(rule.generation for rule, _ in matches)
        own = [match for match in matches if match[0].generation == lowest]
        rule, values = own[0] if len(own) == 1 else _of_layouts(spec, own, key, tensor, sizes)
        name = _family_name(key, rule)
        entry = groups.setdefault((id(rule), name), (rule, {}, len(tensor.shape)))
        entry[1][tuple(values[index] for index in rule.pattern.indices)] = key
    if unknown:
        _refuse_unknown(spec, unknown, specs)
    return tuple(
        Family(rule, name, members, _dims(rule, name, rank))
        for (_, name), (rule, members, rank) in groups.items()
    )


def _of_layouts(
    spec: Architecture,
    matches: Sequence[tuple[TensorRule, dict[str, int]]],
    key: str,
    tensor: TensorSpec,
    sizes: Mapping[str, int],
) -> tuple[TensorRule, dict[str, int]]:
    """Of the layouts that a spec allows for one key, the one that the tensor has.

    Raises:
        ArchitectureError: the rules are of different patterns.
        CheckpointError: several layouts fit.
    """
    first = matches[0][0]
    other = next((r for r, _ in matches if r.pattern.text != first.pattern.text), None)
    if other is not None:
        raise ArchitectureError(
            f"{spec.name}.toml: {key} matches {first.pattern.text} and {other.pattern.text}"
        )

    def fits(rule: TensorRule) -> bool:
        dims = rule.dims_for(len(tensor.shape))
        try:
            return dims is not None and all(
                dim.expression is None or spec.size(dim.expression, sizes) == size
                for dim, size in zip(dims, tensor.shape, strict=True)
            )
        except KeyError:
            return True  # The size that is missing is told later.

    fitting = [match for match in matches if fits(match[0])]
    if len(fitting) > 1:
        layouts = " or ".join(f"({', '.join(d.text for d in rule.dims)})" for rule, _ in fitting)
        raise CheckpointError(
            f"{key}: shape {list(tensor.shape)} is {layouts}, expected one of them only",
            hint="give --arch a copy of the spec that names the layout of this file",
        )
    return fitting[0] if fitting else matches[0]


def _applies(
    rule: TensorRule,
    values: Mapping[str, int],
    listed: Mapping[tuple[str, str], list[object] | None],
) -> bool:
    """Whether the layer of a key is one that the rule is for.

    Args:
        listed: Axis and list of a condition -> its entries.
    """
    for condition in rule.when:
        entries, at = listed[condition.axis, condition.field] or [], values.get(condition.axis)
        same = at is not None and at < len(entries) and str(entries[at]) == condition.value
        if same == condition.negated:
            return False
    return True


def _family_name(key: str, rule: TensorRule) -> str:
    indices = rule.pattern.indices
    if not indices:
        return key
    match = rule.pattern.regex.fullmatch(key)
    assert match is not None
    name = key
    # From the end, so that the places of those before stay right.
    for at in sorted(range(len(indices)), key=lambda at: -match.start(f"i{at}")):
        start, end = match.span(f"i{at}")
        name = f"{name[:start]}{{{indices[at]}}}{name[end:]}"
    return name


def _dims(rule: TensorRule, name: str, rank: int) -> tuple[DimSpec, ...]:
    dims = rule.dims_for(rank)
    if dims is None:
        raise CheckpointError(
            f"{name}: {rank} dimensions, expected {len(rule.dims)} "
            f"({', '.join(dim.text for dim in rule.dims)})",
            hint="is this config.json the checkpoint's own?",
        )
    return dims


def _refuse_unknown(spec: Architecture, unknown: list[str], keys: Iterable[str]) -> None:
    rendered = {key_pattern.sample(rule.pattern): rule.pattern.text for rule in spec.rules}
    import difflib

    near = difflib.get_close_matches(
        key_pattern.INDEX.sub("0", unknown[0]), rendered, n=2, cutoff=0.3
    )
    nearest = f"; nearest are {' and '.join(rendered[text] for text in near)}" if near else ""
    prefix = _wrapper(spec, unknown[0])
    hint = "is this the right architecture? --arch names another"
    if prefix and all(key.startswith(prefix) for key in keys):
        hint = f"every key begins with {prefix}: save the state dict of the module inside of it"
    raise CheckpointError(
        f"{unknown[0]}: no rule of {spec.name}.toml knows this tensor "
        f"({len(unknown)} such: {some(unknown)}){nearest}",
        hint=hint,
    )


def _wrapper(spec: Architecture, unknown: str) -> str:
    """The beginning of a key without which a rule would know it; "" where that is not so."""
    *modules, _ = unknown.split(".")
    for n in range(1, len(modules) + 1):
        prefix = ".".join((*modules[:n], ""))
        inner = unknown.removeprefix(prefix)
        if any(rule.pattern.match(inner) is not None for rule in spec.rules):
            return prefix
    return ""


def _tied(
    head: LMHead, specs: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> TiedHead | None:
    """The head, where it shares the embedding, by the file or by config.json.

    A head tensor beside `tie_word_embeddings: true` is a copy. It is treated as tied: it gets the
    embedding's map, which is right whether the loader ties it or reads it.
    """
    classes = config.get("architectures")
    if isinstance(classes, list) and not head.is_in(str(name) for name in classes):
        return None
    norm = next((n for n in head.norm if any(first_match(n, k) is not None for k in specs)), ())
    if head.norm and not norm and not (isinstance(classes, list) and head.classes):
        return None
    if not any(first_match(head.embed, key) is not None for key in specs):
        return None
    has_tensor = any(first_match(head.head, key) is not None for key in specs)
    told = f"{head.path}tie_word_embeddings"
    # Of a whole the spec says what its classes mean (`tied`); a part has its own class.
    flag = (
        config_fields.meant(config, told) if head.path else config_fields.field_value(config, told)
    )
    if flag is None:
        flag = config.get("tie_word_embeddings", head.tied if has_tensor else None)
    # A head without a key of its own reads the embedding itself, whatever the flag says.
    if flag is not False or not head.head:
        return TiedHead(head, norm)
    if not has_tensor and classes:
        raise CheckpointError(
            f"{key_pattern.sample(head.head[0])}: missing, and config.json says that the head is "
            f"not tied to the embedding ({head.path}tie_word_embeddings false)",
            hint="a head of another name belongs under [head] of the spec; a file that lacks it "
            'because it is tied needs "tie_word_embeddings": true in config.json',
        )
    return None
