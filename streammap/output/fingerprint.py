"""What determines a result's bytes: what a journal is bound to."""

import hashlib
from collections.abc import Iterator, Sequence

from streammap.output.journal import Fingerprint
from streammap.output.shards import Shard
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.plan import Plan


def request_of(
    plan: Plan,
    shards: Sequence[Shard],
    *,
    max_shard_nbytes: int,
    version: str,
    nest: str | None = None,
) -> Fingerprint:
    """The request that a plan and a layout are.

    Args:
        version: Of streammap: another one may round otherwise.
        nest: Entry of a DCP result that the tensors stand under, where that is asked for.
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
        "steps": [{"operator": step.operator, **step.options} for step in plan.steps],
        "maps": [level.digest for level in plan.levels],
        "max_shard_size": max_shard_nbytes,
        "files": {shard.name: shard.nbytes for shard in shards},
    }
    if nest is not None:
        content["nest"] = nest
    return Fingerprint(content, _formulas(plan, shards))


def _formulas(plan: Plan, shards: Sequence[Shard]) -> str:
    """sha256 of how each tensor is made, and where it goes."""
    found = hashlib.sha256()
    number = {id(source): i for i, source in enumerate(plan.sources)}
    maps: dict[int, bytes] = {}
    for shard in shards:
        found.update(shard.head)
        for slot in shard.slots:
            for part in _parts(plan.targets[slot.key], number, maps):
                found.update(part)
    return found.hexdigest()


def _parts(form: LinearForm, number: dict[int, int], maps: dict[int, bytes]) -> Iterator[bytes]:
    for term in form.terms:
        for m in term.maps:
            yield b"-" if m is None else _map(m, maps)
        for coefficient, load in term.blend:
            which = -1 if graph.is_constant(load) else number.get(id(load.source), -2)
            yield f"{coefficient!r} {which} {load.spec} {load.key}\n".encode()


def _map(m: AxisMap, known: dict[int, bytes]) -> bytes:
    """A digest of a map; many tensors share it, so that it is computed once."""
    if id(m) not in known:
        if isinstance(m, BlockMap):
            text = repr((m.n_in, m.block, m.rows)).encode()
        else:
            import ctypes

            matrix = m.matrix.contiguous()
            text = ctypes.string_at(matrix.data_ptr(), matrix.nbytes)
        known[id(m)] = hashlib.sha256(text).digest()
    return known[id(m)]
