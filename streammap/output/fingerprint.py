"""What determines a result's bytes: what its journal, its commit and its ranks are bound to."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.errors import OutputError
from streammap.output import work_folder
from streammap.output.layout import Shard
from streammap.planning import graph
from streammap.planning.graph import Derived, LinearForm
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.plan import FORMAT, Plan

_MAX_CHANGES = 3
_MAX_TEXT = 60


@final
@dataclass(frozen=True)
class Fingerprint:
    """What determines a result."""

    content: Mapping[str, object]
    """In words, so that a run that asks for something else can say what differs."""
    formulas: str
    """sha256 of how each tensor is computed, and where it goes."""

    @property
    def digest(self) -> str:
        """sha256 of both."""
        text = json.dumps([self.content, self.formulas], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def head(self, **first: object) -> dict[str, object]:
        """An object that is bound to this request; `first` are its first entries."""
        return {**first, "digest": self.digest, "request": self.content}

    def check(self, head: Mapping[str, object], path: Path) -> None:
        """Refuse a file of a work folder that is bound to another request.

        Raises:
            OutputError: saying what differs.
        """
        changes = self.changes(head)
        if changes is not None:
            raise OutputError(
                f"{path.parent}: an unfinished run of another request: {changes}",
                hint=f"run the earlier command again, or {work_folder.RESTART}",
            )

    def changes(self, head: Mapping[str, object]) -> str | None:
        """How this request differs from that of `head`, in words; None where it does not."""
        if head.get("digest") == self.digest:
            return None
        plain = json.loads(json.dumps(self.content))
        changes = list(_changes(head.get("request"), plain, ""))
        words = "; ".join(changes[:_MAX_CHANGES]) or "the formulas of its tensors differ"
        n_more = len(changes) - _MAX_CHANGES
        return f"{words} and {n_more} more" if n_more > 0 else words


def of_result(
    plan: Plan,
    shards: Sequence[Shard],
    *,
    max_shard_nbytes: int,
    version: str,
    nest: str | None = None,
) -> Fingerprint:
    """The fingerprint of a plan's result in these shards.

    Args:
        version: Of streammap: another one may round otherwise.
        nest: Entry of a DCP result that the tensors stand under, where one was asked for.
    """
    content: dict[str, object] = {
        "streammap": version,
        "sources": [
            {
                "name": source.name,
                "files": {f.name: {**f.as_json(), "mtime_ns": f.mtime_ns} for f in source.files},
            }
            for source in plan.sources
        ],
        "steps": steps(plan),
        "maps": [level.digest for level in plan.levels],
        "max_shard_size": max_shard_nbytes,
        "files": {shard.name: shard.nbytes for shard in shards},
    }
    if nest is not None:
        content["nest"] = nest
    return Fingerprint(content, _formulas(plan, shards))


def of_plan(plan: Plan) -> str:
    """The digest in a record: sha256 of sources, steps and maps, whatever the shards."""
    content = {
        "format": FORMAT,
        "sources": [
            [
                [f.name, f.nbytes, f.mtime_ns, f.header_digest, *([f.version] * bool(f.version))]
                for f in source.files
            ]
            for source in plan.sources
        ],
        "steps": [[step.operator, dict(step.options)] for step in plan.steps],
        "levels": [level.digest for level in plan.levels],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def steps(plan: Plan) -> list[dict[str, object]]:
    """The operators of a plan with their options, as records and journals have them."""
    return [{"operator": step.operator, **step.options} for step in plan.steps]


def _formulas(plan: Plan, shards: Sequence[Shard]) -> str:
    digest = hashlib.sha256()
    number = {id(source): i for i, source in enumerate(plan.sources)}
    maps: dict[int, bytes] = {}
    for shard in shards:
        digest.update(shard.head)
        for slot in shard.slots:
            for part in _parts(plan.targets[slot.key], number, maps):
                digest.update(part)
    return digest.hexdigest()


def _parts(form: LinearForm, number: dict[int, int], maps: dict[int, bytes]) -> Iterator[bytes]:
    if form.wide:
        yield b"wide"
    for term in form.terms:
        for axis_map in term.maps:
            yield b"-" if axis_map is None else _map(axis_map, maps)
        for coefficient, load in term.blend:
            which = -1 if graph.is_constant(load) else number.get(id(load.source), -2)
            yield f"{coefficient!r} {which} {load.spec} {load.key}\n".encode()
            if isinstance(load.source, Derived):
                yield json.dumps(load.source.formula, sort_keys=True).encode()
                for inner in load.source.inputs:
                    yield f"\n{inner.spec}\n".encode()
                    yield from _parts(inner, number, maps)


def _map(axis_map: AxisMap, known: dict[int, bytes]) -> bytes:
    """A digest of a map. Many tensors share one, so it is computed once."""
    if id(axis_map) not in known:
        digest = hashlib.sha256()
        if isinstance(axis_map, BlockMap):
            digest.update(repr((axis_map.n_in, axis_map.block, axis_map.rows)).encode())
        else:
            for piece in axis_map.matrix.pieces():
                digest.update(piece)
        known[id(axis_map)] = digest.digest()
    return known[id(axis_map)]


def _changes(old: object, new: object, path: str) -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**new, **old}:
            if name not in old or name not in new:
                yield f"{path}{name} {_text(old.get(name))} is now {_text(new.get(name))}"
            else:
                yield from _changes(old[name], new[name], f"{path}{name} ")
    elif old != new or type(old) is not type(new):
        yield f"{path}{_text(old)} is now {_text(new)}"


def _text(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
