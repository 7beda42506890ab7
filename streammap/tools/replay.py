"""A result made again from what was asked for it.

    replay.open("small/streammap.json")                        # as it was recorded
    replay.open("small", sources={"/old/big": "/new/big"})     # its source is elsewhere now
    replay.open({"operator": "coalesce", "width": 2, "source": {"operator": "open", "path": "big"}})

The form is that of operators/request_json.py. Nothing is computed until it is read or saved.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from streammap.api import LazyCheckpoint
from streammap.errors import PlanError
from streammap.io.json_files import read_json
from streammap.io.storage.local import LocalStorage
from streammap.io.storage.resolve import PathLike
from streammap.operators import registry, request_json
from streammap.output import record
from streammap.planning import map_file
from streammap.planning import request as requests
from streammap.planning.map_file import MapLevel
from streammap.planning.request import Moved, OperatorCall


def open(request: PathLike | Mapping[str, object], *, sources: Moved = None) -> LazyCheckpoint:
    """The checkpoint that a request tells of, planned.

    Args:
        request: The tree, a file with it, a result's streammap.json or the result itself.
        sources: Where its sources are, if not where they were.

    Raises:
        StreammapError: no request, a source that is not there, an option that makes no sense.
    """
    if isinstance(request, Mapping):
        return rebuilt(request_json.parse(_tree(request, "request")), sources)
    path = Path(request)
    file = record.path_of(path) if path.is_dir() or path.suffix != ".json" else path
    call = request_json.parse(_tree(read_json(file), str(file)))
    near = path if path.is_dir() or path.suffix != ".json" else path.parent
    return rebuilt(call, sources, known=map_file.find(LocalStorage(near)) if near.exists() else ())


def rebuilt(
    call: OperatorCall, sources: Moved, *, known: Iterable[MapLevel] = ()
) -> LazyCheckpoint:
    """The same from a tree that is parsed; `known` maps may be named by their digest."""
    places = requests.moved(call, sources)
    return LazyCheckpoint(registry.build(call, moved=places, known=known))


def _tree(content: Mapping[str, object], where: str) -> object:
    if "operator" in content:
        return content
    if content.get("request") is None:
        raise PlanError(
            f"{where}: does not say how to make it again",
            hint="it was written by an older version, or by other means than streammap's calls",
        )
    return content["request"]
