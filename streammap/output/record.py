"""The record of a result: where it came from, and what can be checked of it later.

`streammap.json` of a folder, `NAME.streammap.json` beside a single file:

    {
      "streammap": "0.1", "format": 1, "digest": ..., "steps": [...], "sources": [...], ...
      "files": {"model.safetensors": 4096, "config.json": 512},            name -> bytes
      "tensors": {"wte.weight": {"file": "model.safetensors", "crc32": "cbf43926"}}
    }

It is written piece by piece: a result may have a hundred thousand tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from streammap.output import side_files
from streammap.planning.plan import Plan

NAME = side_files.PROVENANCE
SUFFIX = f".{NAME}"
_PIECE = 1000


def beside(file: Path) -> Path:
    """Where the record of a result that is one file goes."""
    return file.with_suffix(SUFFIX)


def path_of(output: Path) -> Path:
    """Where the record of a result is: in a folder, beside a file."""
    return output / NAME if output.is_dir() else beside(output)


def encode(
    plan: Plan, version: str, files: Mapping[str, int], tensors: Iterable[tuple[str, str, int]]
) -> Iterator[bytes]:
    """A record, in pieces.

    Args:
        files: Name -> bytes of each other file of the result.
        tensors: (key, file, CRC-32) of each tensor.
    """
    content = {**side_files.provenance(plan, version), "files": dict(sorted(files.items()))}
    text = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}")
    yield _bytes(f'{text},\n  "tensors": {{')
    lines: list[str] = []
    between = "\n"
    for key, file, crc in tensors:
        entry = json.dumps({"file": file, "crc32": f"{crc:08x}"}, ensure_ascii=False)
        lines.append(f"{between}    {json.dumps(key, ensure_ascii=False)}: {entry}")
        between = ",\n"
        if len(lines) == _PIECE:
            yield _bytes("".join(lines))
            lines.clear()
    yield _bytes("".join((*lines, "\n  }\n}\n" if between != "\n" else "}\n}\n")))


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can hold what UTF-8 can't
        return text.encode(errors="backslashreplace")
