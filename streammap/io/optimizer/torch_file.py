"""A state that torch.save wrote: optimizer.state_dict(), alone or beside a model's state dict.

    {"state": {0: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}, ...},
     "param_groups": [{"lr": ..., "params": [0, ...], "param_names": ["lm_head.weight", ...]}]}

The pickle is read without running it (formats/torch_pickle.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammap.errors import CheckpointError
from streammap.io import weight_files
from streammap.io.checkpoint import Checkpoint, SourceFile
from streammap.io.formats import torch_zip
from streammap.io.formats.safetensors_header import Slot
from streammap.io.formats.torch_pickle import StoredTensor, UnsupportedTensor
from streammap.io.optimizer import state
from streammap.io.optimizer.state import Form, Group, OptimizerFile
from streammap.io.storage.base import Storage
from streammap.io.storage.local import LocalStorage
from streammap.io.tensor_readers import FileTensors

_AGAIN = "save it as torch does: torch.save(optimizer.state_dict(), path)"
_PLAIN = (str, int, float, bool, type(None))
_MOST_STEPS = 2**53
_MOST_NUMBER = 2**63


def read(path: Path) -> OptimizerFile | None:
    """The state in a file of this machine; see `read_from`."""
    return read_from(LocalStorage(path), path.name)


def read_from(storage: Storage, where: str) -> OptimizerFile | None:
    """The state in a file; None where it has none.

    Args:
        storage: The file.
        where: Its name.

    Raises:
        CheckpointError: a pickle that asks for more than tensors and plain values, a state that is
            broken or that has no map.
    """
    path = storage.path(where)
    elsewhere = None if path is not None else weight_files.ranges(storage, where)
    content, storages = torch_zip.contents(path or Path(where), elsewhere)
    table = _found(content)
    if table is None:
        return None
    groups, names = _groups(where, table["param_groups"])
    entries: dict[str, dict[str, float | None]] = {}
    slots: dict[str, Slot] = {}
    for number, kept in table["state"].items():
        name = names.get(number, str(number)[:80])
        if not isinstance(kept, dict):
            raise CheckpointError(f"{where}: the state of {name} is no table", hint=_AGAIN)
        entries[name] = {}
        for entry, value in kept.items():
            if not isinstance(entry, str):
                raise CheckpointError(f"{where}: {name} has a nameless entry", hint=_AGAIN)
            if isinstance(value, StoredTensor | UnsupportedTensor):
                key = state.key_of(name, entry)
                slots[key] = torch_zip.located(where, key, value, storages)
                entries[name][entry] = None
            elif entry == state.STEP and isinstance(value, int | float):
                entries[name][entry] = _steps(where, name, value)
            elif value is not None:
                entries[name][entry] = None  # told by `check`, by its name
    state.check(where, entries, groups)
    is_named = any("param_names" in group for group in table["param_groups"])
    weight_files.check_strides(storage, where, slots.values())
    opened = _opened(storage, where, slots)
    return OptimizerFile(opened, entries, groups, Form("torch", is_named=is_named))


def _found(content: object) -> dict[str, Any] | None:
    """The state dict: what the file holds, or an entry of it."""
    tables = [content, *(content.values() if isinstance(content, dict) else ())]
    for table in tables:
        for one in table if isinstance(table, list) else [table]:  # Lightning keeps a list of them
            if (
                isinstance(one, dict)
                and isinstance(one.get("state"), dict)
                and isinstance(one.get("param_groups"), list)
            ):
                return one
    return None


def _groups(where: str, listed: list[object]) -> tuple[tuple[Group, ...], dict[object, str]]:
    """The groups, and the name of each number."""
    groups, names = [], dict[object, str]()
    for i, group in enumerate(listed):
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(group, dict) or not isinstance(params, list):
            raise CheckpointError(f"{where}: param_groups[{i}] has no params", hint=_AGAIN)
        called = group.get("param_names", [str(number) for number in params])
        if (
            not isinstance(called, list)
            or len(called) != len(params)
            or not all(isinstance(name, str) for name in called)
            or not all(isinstance(number, int | str) for number in params)
        ):
            raise CheckpointError(
                f"{where}: param_groups[{i}] has {len(params)} params, and other param_names",
                hint=_AGAIN,
            )
        names |= dict(zip(params, called, strict=True))
        rest = {n: v for n, v in group.items() if n not in ("params", "param_names")}
        groups.append(Group(tuple(called), options(where, rest)))
    return tuple(groups), names


def options(where: str, given: Mapping[object, object]) -> dict[str, object]:
    """The options of a group.

    Raises:
        CheckpointError: one that is more than numbers and words.
    """
    for name, value in given.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        is_large = any(isinstance(part, int) and abs(part) >= _MOST_NUMBER for part in parts)
        is_plain = all(isinstance(part, _PLAIN) for part in parts)
        if not isinstance(name, str) or not is_plain or is_large:
            told = "a tensor" if isinstance(value, StoredTensor) else type(value).__name__
            raise CheckpointError(
                f"{where}: param_groups: {str(name)[:80]} is {told}, expected a number",
                hint=f"group[{str(name)[:80]!r}] = float(group[{str(name)[:80]!r}]) before saving",
            )
    return {str(name): value for name, value in given.items()}


def _steps(where: str, name: str, value: float) -> float:
    if not 0 <= value < _MOST_STEPS:
        raise CheckpointError(f"{where}: {name} has made {value} steps"[:200], hint=_AGAIN)
    return float(value)


def _opened(storage: Storage, name: str, slots: Mapping[str, Slot]) -> Checkpoint:
    stat = storage.stat(name)
    digest = state.digest_of(slots.values())
    files = {name: storage.open(name, stat)}
    file_of = dict.fromkeys(slots, name)
    return Checkpoint(
        Path(str(storage) if storage.origin else storage.address),
        (SourceFile.of(name, stat, digest),),
        slots,
        file_of,
        None,
        place=storage,
        _opened=dict(files),
        reader=FileTensors(slots, file_of, files),
    )


def renamed(file: OptimizerFile, names: Mapping[str, str]) -> OptimizerFile:
    """The same state under other names of its parameters."""
    checkpoint = file.checkpoint
    keys = {
        state.key_of(name, entry): state.key_of(names[name], entry)
        for name, kept in file.entries.items()
        for entry in kept
    }
    slots = {keys[key]: replace(slot, key=keys[key]) for key, slot in checkpoint.slots.items()}
    file_of = {keys[key]: name for key, name in checkpoint.file_of.items()}
    reader = FileTensors(slots, file_of, checkpoint._opened)
    return replace(
        file,
        checkpoint=replace(checkpoint, slots=slots, file_of=file_of, reader=reader),
        entries={names[name]: kept for name, kept in file.entries.items()},
        groups=tuple(
            replace(group, names=tuple(names[name] for name in group.names))
            for group in file.groups
        ),
    )
