"""The files of a result against its record, byte by byte, and against an independent reader.

Of weights the bytes between the tensors are read here; the tensors themselves are scanned later.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from streammap.analysis.survey import SavedRecord, Survey
from streammap.engine import checksums
from streammap.engine.checksums import Written
from streammap.errors import CheckpointError
from streammap.io import weight_files
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.io.problems import Finding
from streammap.io.safe_open import is_plain_name

_MOST_LETTERS = 1000
"""Of a name with its folders."""


def check(
    folder: Path, seen: Survey, record: SavedRecord, edited: Collection[str]
) -> Iterator[Finding]:
    """All files but the record: there, of their size, with their bytes, and readable by others.

    Args:
        edited: Files that may have been changed.
    """
    bad = {found.file for found in seen.findings if found.level == "error"}
    read = {file.name for file in seen.checkpoint.files}
    by_file = _slots(seen.checkpoint)
    own = {name: written for name, written in record.files.items() if _is_name(name)}
    for name in record.files.keys() - own.keys():
        yield Finding("error", "file", "no name of a file of this folder", file=name)
    for name, written in own.items():
        if name not in bad:
            known = _known(by_file.get(name, ()), record)
            found = _compared(folder / name, name, written, known, is_weights=name in read)
            yield from (_excused(one) if name in edited else one for one in found)
    for name in sorted({*read, *own} - bad):
        if name.endswith(".safetensors") and (folder / name).is_file():
            # Where wrappers' names were taken off, the keys are not those of the file.
            slots = None if seen.checkpoint.wrappers else by_file.get(name)
            yield from _read_by_others(folder / name, name, slots)


def _is_name(name: str) -> bool:
    return len(name) <= _MOST_LETTERS and all(map(is_plain_name, name.split("/")))


def _compared(
    path: Path,
    name: str,
    written: Written,
    known: Iterable[tuple[Slot, int]],
    *,
    is_weights: bool,
) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding("error", "file", "missing", file=name, expected=written.nbytes)
        return
    try:
        found = checksums.of_file(path, known)
    except CheckpointError as error:
        yield Finding("error", "file", error.message, file=name)
        return
    hint = f" (if that is meant: --edited {name})"
    level: Literal["error", "note"] = "error"
    if found.nbytes != written.nbytes:
        message = f"{found.nbytes} bytes, {written.nbytes} were written"
        # Before there were CRCs, files that people edit were not compared: tokenizers, cards.
        if written.crc is None and not is_weights:
            level, hint = "note", ""
        yield Finding(level, "size", message + hint, None, name, found.nbytes, written.nbytes)
    elif written.crc not in (None, found.crc):
        a, b = f"{found.crc:08x}", f"{written.crc:08x}"
        yield Finding("error", "crc32", f"crc32 {a}, {b} was written{hint}", None, name, a, b)


def _excused(found: Finding) -> Finding:
    """A change that was meant; a file that is missing was not changed."""
    if found.check not in ("crc32", "size"):
        return found
    return replace(found, level="note", message=found.message.partition(" (if ")[0])


def _slots(checkpoint: Checkpoint) -> dict[str, list[Slot]]:
    """File -> its tensors, as far as their places are known."""
    by_file: dict[str, list[Slot]] = {}
    for key, name in checkpoint.file_of.items():
        if not name.endswith(weight_files.DCP_SUFFIX):  # chunks are located when they are read
            by_file.setdefault(name, []).append(checkpoint.slots[key])
    return by_file


def _known(slots: Iterable[Slot], record: SavedRecord) -> Iterator[tuple[Slot, int]]:
    """Tensors with the CRCs that were written: where theirs are others, the scan says so."""
    crcs = ((slot, record.crcs.get(slot.key)) for slot in slots)
    return ((slot, int(crc, 16)) for slot, crc in crcs if crc is not None)


def _read_by_others(path: Path, name: str, slots: Sequence[Slot] | None) -> Iterator[Finding]:
    """Whether the format's own library sees the same tensors.

    Args:
        slots: Those that were found; None for a file that was not opened yet, such as a map.
    """
    import safetensors

    try:
        mine = safetensors_header.read(path)[0] if slots is None else slots
        with safetensors.safe_open(path, framework="numpy") as file:
            n_theirs = len(file.keys())
            for slot in mine:
                one = file.get_slice(slot.key)
                found, expected = (one.get_dtype(), tuple(one.get_shape())), slot.spec
                if found != (expected.dtype, expected.shape):
                    message = f"the safetensors library reads {found}, not {expected}"
                    yield Finding("error", "file", message, slot.key, name)
    except (CheckpointError, safetensors.SafetensorError, OSError) as error:
        yield Finding("error", "file", f"the safetensors library: {error}", file=name)
        return
    if n_theirs != len(mine):
        message = f"the safetensors library reads {n_theirs} tensors, not {len(mine)}"
        yield Finding("error", "file", message, file=name)
