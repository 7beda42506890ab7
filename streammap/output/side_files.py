"""What goes along with the weights: config.json, tokenizer and the like, where it came from.

All files of the source's folder are copied byte for byte, but for its weights, training state,
other checkpoints in folders of their own, and what streammap writes itself. Links are followed
inside the folder (and inside a Hub cache), not out of it; how many there are and how large is
bounded. sentence-transformers' pooling follows the hidden size.
"""

import fnmatch
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from streammap.errors import ArchitectureError, CheckpointError, OutputError
from streammap.io import safe_open
from streammap.io.checkpoint import Checkpoint
from streammap.io.json_files import parse_json, read_json
from streammap.operators import request_json
from streammap.output import side_list
from streammap.planning import map_file
from streammap.planning.plan import FORMAT, Plan

PROVENANCE = "streammap.json"
_POOLED = ("word_embedding_dimension", "embedding_dimension")
_MAX_NBYTES = 1_000_000_000
_MAX_TOTAL_NBYTES = 4_000_000_000
_MAX_FILES = 10_000


def copied(side: Checkpoint | None) -> dict[str, Path]:
    """Relative name -> file, for each file that is copied along.

    Raises:
        CheckpointError: a link that leads out of the folder, something that is no file.
    """
    if side is None or not side.is_local or not side.path.is_dir():
        return {}
    found: dict[str, Path] = {}
    total = 0
    for name, path in _walk(side.path, side.path, 0):
        found[name] = path
        total += path.stat().st_size
        if len(found) > _MAX_FILES or total > _MAX_TOTAL_NBYTES:
            raise CheckpointError(
                f"{side.path}: {len(found)} files beside the weights, {total} bytes, at most "
                f"{_MAX_FILES} and {_MAX_TOTAL_NBYTES} are copied along",
                hint="move what is not part of the model out of the folder",
            )
    return dict(sorted(found.items()))


def contents(plan: Plan, along: Mapping[str, Path]) -> dict[str, bytes]:
    """Relative name -> bytes, for each small file that is written anew.

    Args:
        along: What `copied` found.

    Raises:
        OutputError: a side file that can't follow the new sizes.
    """
    found: dict[str, bytes] = {}
    for name, path in along.items():
        changed = _resized(name, partial(read_json, path), plan.sized)
        if changed is not None:
            found[name] = changed
    for name in side_list.elsewhere(plan.side):
        changed = _resized(name, partial(_fetched, plan.side, name), plan.sized)
        if changed is not None:
            found[name] = changed
    if plan.levels:
        found[map_file.NAME] = map_file.encode(plan.levels)
    if plan.config is not None:
        original = None if plan.side is None else plan.side.config_text
        if original is not None and plan.side is not None and plan.config == plan.side.config:
            found["config.json"] = original
        else:
            found["config.json"] = _json(plan.config)
    return found


def provenance(plan: Plan, version: str) -> dict[str, object]:
    """Where a result came from."""
    promise, reason = plan.promise
    return {
        "streammap": version,
        "format": FORMAT,
        "digest": plan.digest,
        "promise": promise,
        "reason": reason,
        "steps": [{"operator": step.operator, **step.options} for step in plan.steps],
        "notes": list(plan.notes),
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


def _walk(root: Path, folder: Path, depth: int) -> Iterator[tuple[str, Path]]:
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if entry.is_dir():
            if depth < side_list.MAX_DEPTH and not entry.is_symlink() and not _is_apart(entry):
                yield from _walk(root, entry, depth + 1)
            continue
        globs = side_list.SKIPPED if folder == root else side_list.SKIPPED_INSIDE
        if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            continue
        inside = entry.relative_to(root).as_posix()
        if not inside.isprintable():
            raise CheckpointError(
                f"{root}: {inside!r}: a file name with letters that can't be shown",
                hint="rename the file, or remove it from the folder",
            )
        yield inside, _checked(root, entry)


def _is_apart(folder: Path) -> bool:
    """Whether a folder is no part of the model: another format, a run, another checkpoint."""
    if any(fnmatch.fnmatchcase(folder.name, glob) for glob in side_list.SKIPPED_FOLDERS):
        return True
    config = folder / "config.json"
    return (folder / PROVENANCE).is_file() or (
        config.is_file() and "model_type" in read_json(config)
    )


def _checked(root: Path, entry: Path) -> Path:
    real = Path(os.path.realpath(entry))
    if not safe_open.is_own(root, entry):
        raise CheckpointError(
            f"{entry}: a link out of the checkpoint, to {real}",
            hint="copy the file into the folder, or remove the link",
        )
    try:
        found = real.stat()
    except OSError as error:
        raise CheckpointError(f"{entry}: {error.strerror}", hint="remove the link") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{entry}: no regular file", hint="remove it from the folder")
    if found.st_size > _MAX_NBYTES:
        raise CheckpointError(
            f"{entry}: {found.st_size} bytes, at most {_MAX_NBYTES} for a file beside the weights",
            hint="move it out of the folder",
        )
    return real


def _fetched(side: Checkpoint | None, name: str) -> Mapping[str, object]:
    assert side is not None
    return parse_json(side_list.fetch(side, name), name)


def _resized(
    name: str, read: Callable[[], Mapping[str, object]], sized: Mapping[str, tuple[int, int]]
) -> bytes | None:
    """A sentence-transformers module's config for the new hidden size; None to copy it."""
    old, new = sized.get("embed", (0, 0))
    if old == new or not fnmatch.fnmatchcase(name, "*/config.json"):
        return None
    content = dict(read())
    fields = [name for name in _POOLED if content.get(name) == old]
    if fields:
        return _json({**content, **dict.fromkeys(fields, new)})
    if content.get("in_features") == old:
        raise OutputError(
            f"{name}: a dense module that reads {old} features; the model will have {new}",
            hint="remove the module from the source folder and modules.json",
        )
    return None


def _json(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # JSON can hold what UTF-8 can't
        return f"{json.dumps(content, indent=2)}\n".encode()
