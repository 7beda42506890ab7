"""The record of a result: where it came from, and what can be checked of it later.

`streammap.json` of a folder, `NAME.streammap.json` beside a single file:

    {
      "streammap": "0.1", "format": 1, "digest": ..., "steps": [...], "sources": [...], ...
      "files": {"model.safetensors": 4096, "config.json": 512},            name -> bytes
      "crc32": {"model.safetensors": "414fa339", "config.json": "..."},
      "tensors": {"wte.weight": {"file": "model.safetensors", "crc32": "cbf43926"}},
                                       with "overflowed" or "vanished": numbers that rounding lost
      "own_crc32": "..."                                                   of all bytes before
    }

A record that lists checksums ends with its own; those of version 0.1 have neither. It is written
piece by piece: a result may have a hundred thousand tensors.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from streammap.common.losses import NOTHING, Losses
from streammap.common.version import VERSION
from streammap.engine import checksums, crc32
from streammap.engine.checksums import Written
from streammap.errors import ArchitectureError, CheckpointError, PlanError
from streammap.io import filenames, json_files, safe_open
from streammap.io.storage import resolve
from streammap.io.storage.local import LocalStorage
from streammap.io.storage.resolve import PathLike
from streammap.operators import request_json
from streammap.output import fingerprint, losses, side_files
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel
from streammap.planning.plan import FORMAT, Plan
from streammap.planning.request import OperatorCall

NAME = filenames.RECORD
SUFFIX = f".{NAME}"
_PIECE = 1000
_FILES, _OWN = "crc32", "own_crc32"
_MOST_SEAL = 100
"""Bytes."""
_SEAL = re.compile(rb',\n  "own_crc32": "([0-9a-f]{8})"\n}\n\Z')


def name_for(single: str | None) -> str:
    """The record's name in the folder of a result; `single` names the file that the result is."""
    return NAME if single is None else path_beside(Path(single)).name


def path_beside(file: Path) -> Path:
    """The record of a result that is one file."""
    return file.with_suffix(SUFFIX)


def path_of(output: Path) -> Path:
    """Where the record of a result is: in a folder, beside a file."""
    return output / NAME if output.is_dir() else path_beside(output)


def saved_request(
    source: PathLike | Mapping[str, object],
) -> tuple[OperatorCall, tuple[MapLevel, ...]]:
    """The request of a result, of its record, or of a file or table with a request alone.

    Returns:
        The request, and the maps saved beside it, which it may name by their digests.

    Raises:
        PlanError: a record without a request, or a request that is not valid.
        CheckpointError: a file that can't be read.
    """
    if isinstance(source, Mapping):
        return _request_in(source, "request"), ()
    path = resolve.here(source)
    is_result = path.is_dir() or path.suffix != ".json"
    file = path_of(path) if is_result else path
    near = path if is_result else path.parent
    maps = map_file.find(LocalStorage(near))
    return _request_in(read(file), str(file)), maps


def read(path: Path) -> Mapping[str, object]:
    """A record as it was written, or another file with a request.

    Raises:
        CheckpointError: it can't be read, or was changed since.
    """
    content, is_changed = read_any(path)
    if is_changed:
        raise CheckpointError(
            f"{path}: changed since it was written: its checksum is another",
            hint="copy it again from where it was made; a request of your own goes into a file of "
            "its own",
        )
    return content


def read_any(path: Path) -> tuple[Mapping[str, object], bool]:
    """A record, and whether it was changed since it was written.

    Raises:
        CheckpointError: it can't be read.
    """
    text = safe_open.content(path, limit=json_files.MAX_JSON_NBYTES)
    content = json_files.parse_json(text, str(path))
    if not {_FILES, _OWN} & content.keys():
        return content, False
    seal = _SEAL.search(text, max(0, len(text) - _MOST_SEAL))
    return content, seal is None or int(seal[1], 16) != crc32.crc32(
        memoryview(text)[: seal.start()]
    )


def _request_in(content: Mapping[str, object], where: str) -> OperatorCall:
    if "operator" in content:
        return request_json.parse(content)
    if content.get("request") is None:
        raise PlanError(
            f"{where}: does not say how to make it again",
            hint="it was written by an older version, or by other means than streammap's calls",
        )
    return request_json.parse(content["request"], recorded=True)


def encode(
    plan: Plan,
    files: Mapping[str, Written],
    tensors: Iterable[tuple[str, str, int]],
    lost: Mapping[str, Losses],
) -> Iterator[bytes]:
    """A record, in pieces.

    Args:
        files: Each other file of the result.
        tensors: (key, file, CRC-32) of each tensor.
        lost: Key -> what rounding lost, for each tensor that lost something.
    """
    crc = 0
    for piece in _body(plan, files, tensors, lost):
        crc = crc32.crc32(piece, crc)
        yield piece
    yield f',\n  "{_OWN}": "{crc:08x}"\n}}\n'.encode()


def _body(
    plan: Plan,
    files: Mapping[str, Written],
    tensors: Iterable[tuple[str, str, int]],
    lost: Mapping[str, Losses],
) -> Iterator[bytes]:
    """All but the record's own checksum."""
    content = {**_provenance(plan, lost), **checksums.as_json(files)}
    text = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}")
    yield _bytes(f'{text},\n  "tensors": {{')
    lines: list[str] = []
    between = "\n"
    for key, file, crc in tensors:
        about = {"file": file, "crc32": f"{crc:08x}", **losses.as_json(lost.get(key, NOTHING))}
        entry = json.dumps(about, ensure_ascii=False)
        lines.append(f"{between}    {json.dumps(key, ensure_ascii=False)}: {entry}")
        between = ",\n"
        if len(lines) == _PIECE:
            yield _bytes("".join(lines))
            lines.clear()
    yield _bytes("".join((*lines, "\n  }" if between != "\n" else "}")))


def _provenance(plan: Plan, lost: Mapping[str, Losses]) -> dict[str, object]:
    """Where a result came from."""
    promise, reason = plan.promise
    return {
        "streammap": VERSION,
        "format": FORMAT,
        "digest": fingerprint.of_plan(plan),
        "promise": promise,
        "reason": reason,
        "steps": fingerprint.steps(plan),
        "notes": [*side_files.notes(plan), *losses.notes(lost)],
        "sizes": _sizes(plan),
        "request": None if plan.request is None else request_json.as_json(plan.request),
        "sources": [
            {
                "name": source.name,
                **source.origin,
                "files": [file.as_json() for file in source.files],
            }
            for source in plan.sources
        ],
    }


def _sizes(plan: Plan) -> dict[str, int] | None:
    """Sizes of the result's axes; None where no spec serves it."""
    try:
        return dict(plan.model.sizes)
    except (ArchitectureError, CheckpointError):
        return None


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can hold what UTF-8 can't
        return text.encode(errors="backslashreplace")
