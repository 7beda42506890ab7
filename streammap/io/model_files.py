"""Which files of a folder are the model: those that transformers loads, or a whole set of shards.

    model.safetensors > its index and shards > pytorch_model.bin > its index and shards
    > a whole set of numbered shards > the only weight file, whatever it is called

What is odd and keeps no loader from reading the model is tolerated, and told in a note.
"""

from streammap.errors import CheckpointError, some
from streammap.io import filenames, json_files, shard_sets
from streammap.io.problems import Finding, Problems
from streammap.io.storage.base import Storage
from streammap.io.weight_files import ADAPTER_CONFIG, INDEXES, SINGLES, read_index, weights_of

_MOST_LETTERS = 200
"""Of a value of adapter_config.json, in a message."""
Found = tuple[tuple[str, ...], dict[str, str] | None]
"""Files in order, and the index that is to be compared with them."""


def choose(storage: Storage, problems: Problems) -> Found:
    """The weight files of a folder, and its index if it has one: those that transformers loads.

    Args:
        problems: Takes what is wrong with the index or the set of files.

    Raises:
        CheckpointError: no weight files, several of which none tells what is where, or an adapter.
    """
    if storage.has(f"{filenames.WORK_SUFFIX}/{filenames.COMMIT_MARK}"):
        raise CheckpointError(
            f"{storage}: a run was stopped while it put its result here",
            hint="run the same command again to finish it",
        )
    for single, index in zip(SINGLES, INDEXES, strict=True):
        if storage.has(single):
            if storage.has(index):
                message = f"not read: loaders prefer {single}, which is there too"
                problems.tolerate([Finding("error", "index", message, file=index)])
            return (single,), None
        if storage.has(index):
            return _of_index(storage, index, problems)
    return _without_index(storage, problems)


def _of_index(storage: Storage, index: str, problems: Problems) -> Found:
    """The files that an index names; where it does not fit them, a whole set of shards."""
    weight_map = read_index(storage, index, problems) or {}
    names = set(weight_map.values())
    missing = sorted(name for name in names if not storage.has(name))
    whole = [one for one in shard_sets.find(weights_of(storage)) if one.is_whole]
    if missing and len(whole) == 1:
        message = (
            f"not read: it is of another split, {some(missing)} is not there; "
            f"the {whole[0].n_shards} shards that are there are a whole set"
        )
        problems.tolerate([Finding("error", "index", message, file=index)])
        return whole[0].names, None
    for one in whole if not missing else ():
        unlisted = [name for name in one.names if name not in names]
        if unlisted and names.intersection(one.names):
            message = (
                f"it does not name {some(unlisted)}, of the same {one.n_shards} shards: read too, "
                "though other loaders would not"
            )
            problems.tolerate([Finding("error", "index", message, file=index)])
            names.update(unlisted)
    return tuple(sorted(names)), weight_map


def _without_index(storage: Storage, problems: Problems) -> Found:
    """The only weight file, or a whole set of numbered shards."""
    names = weights_of(storage)
    loose = [name for name in names if name.endswith(".safetensors")] or names
    sets = shard_sets.find(loose)
    whole = [one for one in sets if one.is_whole]
    usual = [one for one in whole if one.is_usual] or whole
    if len(usual) == 1:
        if usual[0].n_shards > 1:
            message = f"no index: the {usual[0].n_shards} shards are a whole set, and are read"
            problems.tolerate([Finding("error", "index", message)])
        return usual[0].names, None
    if whole:
        raise CheckpointError(
            f"{storage}: {len(whole)} whole sets of shards and no index: "
            f"{some([one.names[0] for one in whole])}",
            hint="move all but one of the sets out of the folder",
        )
    if len(sets) == 1 and len(sets[0].there) == len(loose) and sets[0].missing:
        raise CheckpointError(
            f"{storage}: {len(loose)} of {sets[0].n_shards} shards, missing: "
            f"{some(sets[0].missing)}",
            hint=f"download the missing ones, or name a shard: {storage.where(loose[0])}",
        )
    if len(loose) == 1:
        return (loose[0],), None
    if loose:
        raise CheckpointError(
            f"{storage}: {len(loose)} weight files and no index: {some(loose)}",
            hint=f"name the one that has the model, such as {storage.where(loose[0])}; "
            f"if they are shards, {INDEXES[0]} has to say which key is in which",
        )
    if storage.has(ADAPTER_CONFIG):
        raise _adapter_alone(storage)
    raise CheckpointError(
        f"{storage}: no weights: expected one of {', '.join((*SINGLES, *INDEXES))}",
        hint="name a checkpoint folder, a .safetensors or a .pth file",
    )


def _adapter_alone(storage: Storage) -> CheckpointError:
    """The error for a folder that holds an adapter and no model."""
    content = json_files.read_stored(storage, ADAPTER_CONFIG)[0]
    kind = str(content.get("peft_type", "LORA"))[:_MOST_LETTERS]
    kind = "LoRA" if kind == "LORA" else kind
    base = content.get("base_model_name_or_path")
    of = f"to {str(base)[:_MOST_LETTERS]!r}" if base else "to a model that it does not name"
    place = storage.origin.get("repo", str(storage))
    model = base if isinstance(base, str) and len(base) < _MOST_LETTERS else "MODEL"
    return CheckpointError(
        f"{storage}: a {kind} adapter {of}, expected a model",
        hint=f"name both, {model}+{place}, or merge it: streammap merge-lora {model} {place} "
        "--output merged",
    )
