"""Whether a checkpoint's tensors are all those of its model, in the shapes of config.json."""

from collections.abc import Iterable, Mapping

from streammap.architectures import config_fields, key_pattern, layer_kinds
from streammap.architectures.key_pattern import KeyPattern, first_match
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import DimSpec
from streammap.errors import CheckpointError
from streammap.io.dtypes import TensorSpec


def check_shapes(model: Model, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse tensors whose shapes are not those that config.json says.

    Raises:
        CheckpointError: such a tensor.
    """
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


def _expected(model: Model, family: Family, dim: DimSpec) -> int | None:
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


def check_complete(model: Model) -> None:
    """Refuse layers that lack tensors, layers that config.json doesn't count, missing tensors.

    Raises:
        CheckpointError: one of these.
    """
    missing: list[str] = []
    n_missing = 0
    for axis in model.architecture.depth_axes:
        _check_surplus(model, axis)
        names, n = _missing(model, axis)
        missing += names
        n_missing += n
    for required in _unmet(model):
        missing.append(required)
        n_missing += 1
    if missing:
        examples = ", ".join(missing[:3])
        if n_missing > 3:
            examples += f" and {n_missing - 3} more"
        raise CheckpointError(
            f"{missing[0]}: missing ({n_missing} tensors: {examples})",
            hint="download or save the checkpoint again",
        )


def _unmet(model: Model) -> Iterable[str]:
    """Required patterns that no family fits; alternatives of one text count as one."""
    by_text: dict[str, list[KeyPattern]] = {}
    for required in model.architecture.required:
        by_text.setdefault(required.text, []).append(required)
    for patterns in by_text.values():
        keys = (f.with_new_ending(next(iter(f.members.values()))) for f in model.families)
        if not any(first_match(patterns, key) is not None for key in keys):
            yield key_pattern.sample(patterns[0])


def _check_surplus(model: Model, axis: str) -> None:
    n_layers = model.sizes[axis]
    depth = model.architecture.depth.get(axis)
    tail = 0
    if depth is not None and depth.tail is not None:
        value = config_fields.field_value(model.config, depth.tail)
        # Some checkpoints with such a tail have a config.json that doesn't count it.
        tail = value if isinstance(value, int) and value > 0 else 1
    surplus = [
        key
        for family in model.families
        if axis in family.indices
        for values, key in family.members.items()
        if values[family.indices.index(axis)] >= n_layers + tail
    ]
    if surplus:
        raise CheckpointError(
            f"{surplus[0]}: config.json says {n_layers} layers (0 to {n_layers - 1}); "
            f"{len(surplus)} tensors are of later ones",
            hint="is this config.json the checkpoint's own?",
        )


def _missing(model: Model, axis: str) -> tuple[list[str], int]:
    """Some of the keys that layers lack and others of their kind have, and how many these are."""
    members: dict[layer_kinds.LayerKind, list[int]] = {}
    for i, kind in enumerate(model.kinds(axis)):
        members.setdefault(kind, []).append(i)
    names: list[str] = []
    n_missing = 0
    held: set[int] = set()
    for family in model.families:
        if axis not in family.indices or family.rule.kind == "drop":
            continue
        at = family.indices.index(axis)
        rests: dict[tuple[int, ...], set[int]] = {}
        for values in family.members:
            rests.setdefault((*values[:at], *values[at + 1 :]), set()).add(values[at])
        for rest, there in rests.items():
            held |= there
            for same in members.values():
                if there.isdisjoint(same) or there.issuperset(same):
                    continue
                lacking = [i for i in same if i not in there]
                n_missing += len(lacking)
                names += [family.key((*rest[:at], i, *rest[at:])) for i in lacking[:3]]
    # A model may be the encoder or the decoder alone: then an axis has no layers at all.
    if not n_missing and held:
        empty = [i for same in members.values() for i in same if i not in held]
        return [f"layer {i} of {axis}" for i in empty[:3]], len(empty)
    return names[:3], n_missing
