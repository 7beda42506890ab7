"""The one gate through which plans are made and recorded.

What goes through `open_source` and `apply` can be made again by `build`, from its record alone. A
plan that was made by other means has no record: its `request` is None.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, final

from streammap.architectures import registry as specs
from streammap.common import declare
from streammap.common.kinds import shown
from streammap.errors import ArchitectureError, CheckpointError, PlanError, SchemeError, some
from streammap.io import adapter_files, filenames, json_files, safe_open
from streammap.io.checkpoint import Checkpoint, open_checkpoint
from streammap.io.storage import resolve
from streammap.operators import registry
from streammap.operators.declare import Operator, PlanLike, inputs_of, is_adapter, settled
from streammap.operators.recipes import mergekit
from streammap.planning import map_file, plan
from streammap.planning.map_file import MapLevel
from streammap.planning.plan import Find, Pending, Plan, Search
from streammap.planning.request import MapDigests, OperatorCall

View = Callable[[Plan], Plan]
"""What is taken of an opened model."""
Plans = dict[str, "Plan | tuple[Plan, ...]"]
"""Name of an input -> its plan, or those of several."""


def open_source(
    source: str | Path,
    *,
    config: str | Path | Mapping[str, object] | None = None,
    arch: str | None = None,
    maps: tuple[MapLevel, ...] | None = None,
    stream: bool = False,
) -> Plan:
    """A folder or file of weights, as it is; or what is made of others by a name for it.

    "model+adapter" is the model with the adapter merged; a file of YAML is a recipe.

    Args:
        config: config.json, where it is not beside the weights.
        arch: The architecture spec's name or file, where config.json does not tell.
        maps: The maps saved with it; None to look for them.
        stream: Whether a model of the Hub is read as needed; no part of the record.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
        PlanError: a recipe that asks for what is not known.
    """
    if mergekit.is_recipe(source):
        return _of_recipe(source, config=config, arch=arch, stream=stream)
    source, adapters = adapter_files.split(source)
    if adapters:
        model = open_source(source, config=config, arch=arch, maps=maps, stream=stream)
        cls = registry.load("merge-lora")
        return apply(declare.make(cls, {"adapters": adapters}), model, stream=stream)
    path = None if isinstance(config, Mapping) else config
    opened = open_checkpoint(source, config=path, stream=stream)
    if isinstance(config, Mapping):
        opened = replace(opened, config=config, config_text=None)
    levels = _levels(opened) if maps is None else maps
    arch = _carried_spec(opened) if arch is None else arch
    options: dict[str, object] = {"path": opened.address}
    if config is not None and opened.config is not None:
        options["config"] = dict(opened.config)
    if arch is not None:
        options["arch"] = str(Path(arch).absolute()) if _is_spec_file(arch) else arch
    options["maps"] = levels
    made = plan.from_checkpoint(opened, levels, architecture=arch)
    named = [path, arch if arch is not None and _is_spec_file(arch) else None]
    made = replace(made, named=_here(one for one in named if one is not None))
    return made.with_request(OperatorCall("open", options))


def _of_recipe(source: str | Path, *, config: object, arch: str | None, stream: bool) -> Plan:
    """The plan that a recipe describes; its record holds the request, and not the recipe."""
    if config is not None:
        raise PlanError(f"{source}: a recipe has no config.json", hint="leave --config out")
    file = resolve.here(source)
    recipe = mergekit.read(file)
    models = [*recipe.models, *(() if recipe.base is None else (recipe.base,))]
    plans = [open_source(model, arch=arch, stream=stream) for model in models]
    base = None if recipe.base is None else plans.pop()
    made = apply(recipe.operator(plans[1:], base), plans[0])
    return replace(made, named=(*made.named, *_here([file])))


def open_adapter(source: str | Path, *, stream: bool = False) -> Plan:
    """An adapter's folder, as it is: its tensors, and adapter_config.json as the config.

    Raises:
        CheckpointError: nothing there, or no adapter.
    """
    opened = adapter_files.open_adapter(source, stream=stream)
    return plan.as_it_is(opened).with_request(OperatorCall("open", {"path": opened.address}))


def plan_of(source: PlanLike, *, stream: bool = False, adapter: bool = False) -> Plan:
    """The plan of what is opened or planned already, or of a checkpoint or an adapter to open.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
    """
    if isinstance(source, str | Path):
        return (open_adapter if adapter else open_source)(source, stream=stream)
    return source if isinstance(source, Plan) else source.plan


def apply(operator: Operator, source: Plan, *, stream: bool = False) -> Plan:
    """The plan that an operator makes of its source and its further inputs, with its record.

    Args:
        stream: Whether inputs that are opened here are read from the Hub as needed.

    Raises:
        StreammapError: an input that can't be opened, or options that do not fit the model.
    """
    if source.optimizer is not None:
        raise PlanError(
            f"{operator.name} of a plan with its optimizer's state",
            hint="take the state along last: it then goes through all operators",
        )
    plans: Plans = {}
    for one in inputs_of(operator):
        value, adapter = getattr(operator, one.name), is_adapter(one)
        if isinstance(value, tuple):
            plans[one.name] = tuple(plan_of(each, stream=stream, adapter=adapter) for each in value)
        elif value is not None:
            plans[one.name] = plan_of(value, stream=stream, adapter=adapter)
    values, named = settled(operator, source), _here(declare.named_files(operator))
    operator = replace(operator, **values) if values else operator  # type: ignore[type-var]
    try:
        operator, source, plans = _arranged(operator, source, plans, stream=stream)
        operator = operator.completed(source, **plans)
        made = operator.plan(source, **plans)
    except ArchitectureError as error:
        arch = _recorded_arch(source)
        if arch is None:
            raise
        hint = f"its record says that it was made with --arch {arch}: give that again"
        raise ArchitectureError(error.message, hint=hint) from error
    if made is source:
        return source  # its record says all
    inputs = (source, *_each(plans))
    named = tuple(dict.fromkeys((*named, *(path for one in inputs for path in one.named))))
    made = replace(made, named=named, pending=_pending(operator, source, plans))
    return made.with_request(_recorded(operator, {"source": source, **plans}))


def _arranged(
    operator: Operator, source: Plan, plans: Plans, *, stream: bool
) -> tuple[Operator, Plan, Plans]:
    made, first, inputs = operator.arranged(partial(apply, stream=stream), source, **plans)
    return made, first, dict(inputs)


def _pending(operator: Operator, source: Plan, plans: Plans) -> Pending | None:
    """What has to be found before a plan can be run; None where nothing has to."""
    waiting = [one.pending for one in (source, *_each(plans)) if one.pending is not None]
    if waiting:
        searches = tuple(dict.fromkeys(search for one in waiting for search in one.searches))
        return _Again(operator, source, plans, searches)
    search = operator.search(source, **plans)
    return None if search is None else _Again(operator, source, plans, (search,))


@final
class _Again(Pending):
    """An operator that is applied again once what it needs is found."""

    def __init__(
        self, operator: Operator, source: Plan, plans: Plans, searches: tuple[Search, ...]
    ) -> None:
        self._operator, self._source, self._plans = operator, source, plans
        self.searches = searches

    def settled(self, find: Find) -> Plan:
        """See Pending: the inputs first, then the operator's own search."""
        if self.known is not None:
            return self.known
        source = _settled(self._source, find)
        plans: Plans = {
            name: tuple(_settled(one, find) for one in given)
            if isinstance(given, tuple)
            else _settled(given, find)
            for name, given in self._plans.items()
        }
        operator = self._operator
        search = operator.search(source, **plans)
        if search is not None:
            operator = operator.found(find(search))
        self.known = apply(replace(operator, **plans), source)  # type: ignore[type-var]
        return self.known


def _settled(plan: Plan, find: Find) -> Plan:
    return plan if plan.pending is None else plan.pending.settled(find)


def _each(plans: Plans) -> Iterator[Plan]:
    for given in plans.values():
        yield from given if isinstance(given, tuple) else (given,)


def _recorded(operator: Operator, plans: Plans) -> OperatorCall | None:
    """The call that made a plan; None where one of its inputs has no record."""
    inputs: dict[str, OperatorCall | tuple[OperatorCall, ...]] = {}
    for name, given in plans.items():
        requests = [one.request for one in (given if isinstance(given, tuple) else (given,))]
        known = tuple(request for request in requests if request is not None)
        if len(known) < len(requests):
            return None
        inputs[name] = known if isinstance(given, tuple) else known[0]
    return OperatorCall(operator.name, declare.encode(operator), inputs)


def build(
    call: OperatorCall,
    *,
    moved: Mapping[str, str | Path] | None = None,
    known: Iterable[MapLevel] = (),
    view: View | None = None,
) -> Plan:
    """The plan that a record tells of.

    Args:
        moved: Path of a source in the record -> where it is now.
        known: Maps that a record may name by their digest only.
        view: What is taken of each opened model, instead of the model itself.

    Raises:
        StreammapError: a source is not there, or an option that makes no sense.
    """
    return _Builder(moved or {}, {level.digest: level for level in known}, view).plan(call)


@final
class _Builder:
    """Opens each source once."""

    def __init__(
        self,
        moved: Mapping[str, str | Path],
        known: Mapping[str, MapLevel],
        view: View | None,
    ) -> None:
        self._moved, self._known, self._view = moved, known, view
        self._opened: dict[int, Plan] = {}

    def plan(self, call: OperatorCall, *, adapter: bool = False) -> Plan:
        """The plan of one call.

        Args:
            adapter: Whether what is opened is an adapter.
        """
        if call.operator == "open":
            if id(call) not in self._opened:
                self._opened[id(call)] = self._open_adapter(call) if adapter else self._open(call)
            return self._opened[id(call)]
        cls = registry.load(call.operator)
        adapters = {one.name for one in inputs_of(cls) if is_adapter(one)}
        plans: dict[str, Any] = {}
        for name, calls in call.inputs.items():
            made = partial(self.plan, adapter=name in adapters)
            plans[name] = tuple(map(made, calls)) if isinstance(calls, tuple) else made(calls)
        source: Plan = plans.pop("source")
        options = self._with_maps(call, source.levels)
        return apply(declare.decode(cls, options, what=call.operator, **plans), source)

    def _open_adapter(self, call: OperatorCall) -> Plan:
        if self._view is not None:
            raise PlanError(
                f"--optimizer: {_path_of(call)} is an adapter, which no optimizer of the model "
                "has a state of",
                hint="leave --optimizer out: the optimizer starts fresh",
            )
        path = _path_of(call)
        return open_adapter(self._moved.get(path, path))

    def _open(self, call: OperatorCall) -> Plan:
        path, arch = _path_of(call), call.options.get("arch")
        if arch is not None and not isinstance(arch, str):
            raise PlanError(f"open: arch is {arch!r}, expected a name")
        unknown = set(call.options) - {"path", "config", "arch", "maps"}
        if unknown:
            raise PlanError(f"open: unknown option {some(sorted(unknown))}")
        config, place = call.options.get("config"), self._moved.get(path, path)
        if config is not None and not isinstance(config, Mapping):
            raise PlanError(f"open: config is {shown(config)}, expected an object")
        by_digest = isinstance(call.options.get("maps"), MapDigests)
        try:
            near = map_file.find(resolve.locate(place, stream=False)) if by_digest else ()
        except OSError as error:
            raise PlanError(f"open: {place}: {error.strerror}", hint="say where it is") from error
        maps = self._with_maps(call, near).get("maps")
        levels = maps if isinstance(maps, tuple) else None
        opened = open_source(place, config=config, arch=arch, maps=levels)
        return opened if self._view is None else self._view(opened)

    def _with_maps(self, call: OperatorCall, near: tuple[MapLevel, ...]) -> Mapping[str, object]:
        """The call's options, with maps in the place of their digests."""
        maps = call.options.get("maps")
        if not isinstance(maps, MapDigests):
            return call.options
        known = {**self._known, **{level.digest: level for level in near}}
        missing = [digest for digest in maps.sha256 if digest not in known]
        if missing:
            raise SchemeError(
                f"{call.operator}: the map with sha256 {missing[0][:16]} is neither saved with the "
                "source nor with the result",
                hint="put the map file that was used beside the source",
            )
        return {**call.options, "maps": tuple(known[digest] for digest in maps.sha256)}


def _path_of(call: OperatorCall) -> str:
    """What a call opens."""
    path = call.options.get("path")
    if not isinstance(path, str) or "\0" in path:
        raise PlanError(f"open: path is {path!r}, expected text")
    return path


def _here(named: Iterable[str | PurePath]) -> tuple[Path, ...]:
    """The files of this machine among those that were named."""
    texts = [os.fspath(one) for one in named]
    return tuple(resolve.local_path(text) for text in texts if not resolve.is_elsewhere(text))


def _carried_spec(opened: Checkpoint) -> str | None:
    """The spec file that a result has beside its weights, where no known spec serves its model."""
    place = opened.place
    if place is None or place.file is not None or not opened.is_local:
        return None
    file = opened.path / filenames.SPEC
    if not file.is_file() or not safe_open.is_own(opened.path, file):
        return None
    model_type = (opened.config or {}).get("model_type")
    return None if model_type in specs.model_types() else str(file)


def _recorded_arch(source: Plan) -> str | None:
    """The spec file that an opened result was made by, if its record names one."""
    place = source.sources[0].place if len(source.sources) == 1 else None
    if place is None or source.architecture is not None or not place.has(filenames.RECORD):
        return None
    with contextlib.suppress(CheckpointError):
        call = json_files.read_stored(place, filenames.RECORD)[0].get("request")
        while isinstance(call, Mapping):
            arch = call.get("arch")
            if isinstance(arch, str) and _is_spec_file(arch):
                return arch
            call = call.get("source")
    return None


def _is_spec_file(arch: str) -> bool:
    try:
        return Path(arch).is_file()
    except OSError:  # not a name that a file can have
        return False


def _levels(opened: Checkpoint) -> tuple[MapLevel, ...]:
    """The maps saved with a checkpoint."""
    return () if opened.place is None else map_file.find(opened.place)
