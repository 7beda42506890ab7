"""The calls that make plans, each with its record; `build` makes the same plan from a record.

This is the only gate: what goes through here can be made again, see request_tree.py. A plan
that was made by other means has no record, and says so by `request` None.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap.errors import PlanError, SchemeError, some
from streammap.io.checkpoint import Checkpoint, open_checkpoint
from streammap.io.json_files import read_config
from streammap.io.storage import resolve
from streammap.operators.interpolate import Interpolate
from streammap.planning import map_file, plan
from streammap.planning.map_file import MapLevel
from streammap.planning.plan import Plan
from streammap.planning.request_tree import OperatorCall

if TYPE_CHECKING:
    from streammap.operators.resize import Resize


def open_source(
    source: str | Path,
    *,
    config: str | Path | Mapping[str, object] | None = None,
    arch: str | None = None,
    maps: tuple[MapLevel, ...] | None = None,
    stream: bool = False,
) -> Plan:
    """A folder or file of weights, as it is.

    Args:
        stream: Whether a model of the Hub is read as needed; no part of the record.
        maps: The maps saved with it; None to look for them.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
    """
    path = None if isinstance(config, Mapping) else config
    opened = open_checkpoint(source, config=path, stream=stream)
    if isinstance(config, Mapping):
        opened = replace(opened, config=config, config_text=None)
    levels = _levels(opened) if maps is None else maps
    options: dict[str, object] = {"path": opened.address}
    if config is not None:
        options["config"] = dict(config if isinstance(config, Mapping) else read_config(config))
    if arch is not None:
        options["arch"] = str(Path(arch).absolute()) if _is_spec_file(arch) else arch
    made = plan.from_checkpoint(opened, levels, architecture=arch)
    return made.asked(OperatorCall("open", options, levels))


def _is_spec_file(arch: str) -> bool:
    try:
        return Path(arch).is_file()
    except OSError:  # no name that a file can have
        return False


def _levels(opened: Checkpoint) -> tuple[MapLevel, ...]:
    """The maps saved with a checkpoint."""
    return () if opened.place is None else map_file.find_at(opened.place)


def resize(source: Plan, op: "Resize") -> Plan:
    """The resized plan. See Resize.plan for what it raises."""
    from streammap.operators import resize_json

    call = OperatorCall(op.direction, resize_json.encode(op), op.levels, source=source.request)
    return op.plan(source).asked(None if source.request is None else call)


def interpolate(source: Plan, target: Plan, *, alpha: float) -> Plan:
    """The blended plan. See Interpolate.plan for what it raises."""
    made = Interpolate(alpha).plan(source, target)
    if source.request is None or target.request is None:
        return made.asked(None)
    call = OperatorCall(
        "interpolate", {"alpha": alpha}, source=source.request, target=target.request
    )
    return made.asked(call)


def configure(source: Plan, config: Mapping[str, object]) -> Plan:
    """The plan with another config.json."""
    made = replace(source, config=config)
    if source.request is None:
        return made
    return made.asked(OperatorCall("configure", {"config": dict(config)}, source=source.request))


def build(
    call: OperatorCall,
    *,
    moved: Mapping[str, str | Path] | None = None,
    known: Iterable[MapLevel] = (),
) -> Plan:
    """The plan that a record tells of.

    Args:
        moved: Path of a source in the record -> where it is now.
        known: Maps that a record may name by their digest only.

    Raises:
        StreammapError: a source is not there, or an option that makes no sense.
    """
    return _Builder(moved or {}, {level.digest: level for level in known}).plan(call)


@final
class _Builder:
    """Opens each source once."""

    def __init__(self, moved: Mapping[str, str | Path], known: Mapping[str, MapLevel]) -> None:
        self._moved, self._known = moved, known
        self._opened: dict[int, Plan] = {}

    def plan(self, call: OperatorCall) -> Plan:
        if call.operator == "open":
            if id(call) not in self._opened:
                self._opened[id(call)] = self._open(call)
            return self._opened[id(call)]
        assert call.source is not None
        source = self.plan(call.source)
        if call.operator == "interpolate":
            assert call.target is not None
            alpha = call.options.get("alpha")
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise PlanError(f"interpolate: alpha is {alpha!r}, expected 0 to 1")
            return interpolate(source, self.plan(call.target), alpha=float(alpha))
        if call.operator == "configure":
            config = _config(call)
            if config is None:
                raise PlanError("configure: no config", hint='give {"config": {...}}')
            return configure(source, config)
        maps = self._maps(call, source.levels)
        from streammap.operators import resize_json

        return resize(source, resize_json.decode(call.operator, call.options, maps))

    def _open(self, call: OperatorCall) -> Plan:
        path, arch = call.options.get("path"), call.options.get("arch")
        if not isinstance(path, str) or "\0" in path:
            raise PlanError(f"open: path is {path!r}, expected text")
        if arch is not None and not isinstance(arch, str):
            raise PlanError(f"open: arch is {arch!r}, expected a name")
        unknown = set(call.options) - {"path", "config", "arch"}
        if unknown:
            raise PlanError(f"open: unknown option {some(sorted(unknown))}")
        config, place = _config(call), self._moved.get(path, path)
        try:
            near = resolve.locate(place, stream=False)
            found = map_file.find_at(near) if call.digests else ()
        except OSError as error:
            raise PlanError(f"open: {place}: {error.strerror}", hint="say where it is") from error
        return open_source(place, config=config, arch=arch, maps=self._maps(call, found))

    def _maps(self, call: OperatorCall, near: tuple[MapLevel, ...]) -> tuple[MapLevel, ...] | None:
        if not call.digests:
            return call.maps
        known = {**self._known, **{level.digest: level for level in near}}
        missing = [digest for digest in call.digests if digest not in known]
        if missing:
            raise SchemeError(
                f"{call.operator}: the map with sha256 {missing[0][:16]} is neither saved with the "
                "source nor with the result",
                hint="put the map file that was used beside the source",
            )
        return tuple(known[digest] for digest in call.digests)


def _config(call: OperatorCall) -> Mapping[str, object] | None:
    config = call.options.get("config")
    if config is not None and not isinstance(config, Mapping):
        raise PlanError(f"{call.operator}: config is no object")
    return config
