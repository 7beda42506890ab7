"""What a model class of transformers would save, asked of the class itself on the meta device.

A `Workbench` holds one configuration, every default spelt out, and builds the model of it with any
field changed: shapes cost nothing there, so that a question takes about 10 ms. Its answer is a
`Snapshot`: the keys that save_pretrained would write, with their shapes, and the whole-number
attributes of the modules. The modules behind the keys (`Part`) tell who makes a dimension and who
reads it. Nothing of a checkpoint's folder is ever imported: a model type that transformers does not
have is refused.
"""

import contextlib
import copy
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

from streammap.architectures import config_fields, layer_rules
from streammap.architectures.classes import model_class
from streammap.architectures.key_pattern import INDEX
from streammap.common import optional
from streammap.errors import ArchitectureError
from streammap.tools.spec_infer import config_changes, disk_names
from streammap.tools.spec_infer.config_changes import Changes, Fields
from streammap.tools.spec_infer.disk_names import DiskNames, MetaTensor

REBUILT = ("out_features", "out_indices", "stage_names")
"""Fields that a class makes again from the number of layers."""
_DERIVED = (
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    *REBUILT,
)
_MAX_LIST = 8
LIST_SIZE = re.compile(r"dim|size|channels|width")
"""Lists of one size a stage."""
_RATIO = re.compile(r"ratio|mult|expan|factor")
_OPTIONAL = re.compile(r"dim|size|inner|heads|rank|width")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One model, built without memory."""

    shapes: Mapping[str, tuple[int, ...]]
    """On-disk key -> shape; of an outline, the key in the model."""
    attributes: Mapping[tuple[str, str], int]
    """(module, attribute) -> value, of those that are whole numbers."""

    templates: frozenset[str]
    """The keys, every number in them "*"."""
    n_elements: int
    """Numbers in all tensors."""
    counts: Mapping[str, int]
    """Beginning of keys up to a number ("layers.", "layers.*.experts.") -> the highest + 1."""


class _Config(Protocol):
    """A configuration of transformers, as far as it is used here."""

    def to_dict(self) -> dict[str, object]: ...


_ConfigClass = Callable[..., _Config]


class Module(Protocol):
    """A module of torch."""

    def named_modules(self) -> Iterator[tuple[str, "Module"]]:
        """Itself and all modules inside, by path."""
        ...

    def named_parameters(self, *, recurse: bool) -> Iterator[tuple[str, MetaTensor]]:
        """Its parameters."""
        ...

    def named_buffers(self, *, recurse: bool) -> Iterator[tuple[str, MetaTensor]]:
        """Its buffers."""
        ...


class Net(Module, Protocol):
    """A model of transformers."""

    base_model_prefix: str
    config: _Config
    _keys_to_ignore_on_save: Iterable[str] | None

    @property
    def base_model(self) -> Module:
        """What all classes of the model type share."""
        ...

    def tie_weights(self) -> None:
        """Make tied parameters one."""
        ...

    def state_dict(self) -> dict[str, MetaTensor]:
        """Parameters and buffers by key."""
        ...

    def get_input_embeddings(self) -> Module:
        """The token embeddings."""
        ...

    def get_output_embeddings(self) -> Module | None:
        """The head."""
        ...


@dataclass(frozen=True, slots=True)
class Field:
    """A whole-number field of the configuration."""

    name: str
    """Dotted, from the top."""
    value: int

    @property
    def scope(self) -> str:
        """The part of the configuration it stands in."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """Its own name."""
        return self.name.rpartition(".")[2]


class Workbench:
    """One configuration, and the models that differ from its model in some fields."""

    def __init__(self, config: Fields, *, name: str) -> None:
        """Find the classes for `config`, and spell out its defaults.

        Raises:
            ArchitectureError: a model that transformers does not have, or can't build.
            PlanError: transformers is not installed.
        """
        given = config_changes.decoded(
            {k: v for k, v in config.items() if k not in ("auto_map", "dtype")}
        )
        self.given: Fields = given
        self.model_type, self._config_class = _config_class(config, name)
        self.n_probes = 0
        self._cache: dict[tuple[str, bool], Snapshot | None] = {}
        self._disk_names = DiskNames()
        self._defaults: dict[tuple[str, str], int | None] = {}
        self._built: Fields | None = None
        self._modules: tuple[str, ...] | None = None
        try:
            with optional.quiet(hide_warnings=True):
                finished = self._config_class(**copy.deepcopy(given))
                self._net_class = _net_class(finished, config, name)
                own: _ConfigClass = getattr(self._net_class, "config_class", self._config_class)
                if own is not self._config_class and not isinstance(finished, cast("type", own)):
                    # A type that borrows another's model: what is null takes that one's defaults.
                    every = finished.to_dict().items()
                    named = {k: v for k, v in every if v is not None or k in given}
                    self._config_class, finished = own, own(**_plain(named))
                self.finished: Fields = finished.to_dict()
                self.fields: dict[str, object] = _plain(self.finished)
        except ArchitectureError:
            raise
        except Exception as error:
            raise ArchitectureError(
                f"{name}: transformers can't read its config: {str(error)[:200]}",
                hint="is this config.json the model's own?",
            ) from error
        self.class_name = str(getattr(self._net_class, "__name__", ""))
        self._name = name

    def base(self) -> Snapshot:
        """The model of the configuration itself.

        Raises:
            ArchitectureError: it can't be built.
        """
        snapshot = self.snapshot({})
        if snapshot is None:
            raise ArchitectureError(
                f"{self._name}: {self.class_name} can't be built: {self.why()}",
                hint="check config.json, or write a spec by hand",
            )
        return snapshot

    def numbers(self) -> tuple[Field, ...]:
        """The fields that may be sizes."""
        fields = []
        for name, value in config_changes.leaves(self.fields):
            leaf = name.rpartition(".")[2]
            if isinstance(value, bool) or config_changes.NO_SIZE.search(leaf):
                continue
            if isinstance(value, list) and 0 < len(value) <= _MAX_LIST and LIST_SIZE.search(leaf):
                name, value = f"{name}.-1", value[-1]
            whole = isinstance(value, int) and value > 0
            ratio = isinstance(value, float) and value >= 1 and value.is_integer()
            if whole or (ratio and _RATIO.search(leaf)):
                fields.append(Field(name, int(cast("float", value))))
        return tuple(fields)

    def lists(self, scope: str) -> dict[str, list[object]]:
        """The list-valued fields of one part of the configuration."""
        found: dict[str, list[object]] = {}
        for fields in (self._built_fields(), self.fields):
            inside = config_fields.field_value(fields, scope) if scope else fields
            entries = inside.items() if isinstance(inside, dict) else ()
            found |= {k: v for k, v in entries if isinstance(v, list)}
        return found

    def made_list(self, field: str, changes: Changes) -> list[object] | None:
        """The list that the configuration class makes of a `field` that is not there."""
        with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
            fields = config_changes.changed(self.fields, {**changes, field: None})
            value = config_fields.field_value(self._config_class(**fields).to_dict(), field)
            return value if isinstance(value, list) else None
        return None

    def adopt(self, changes: Changes) -> bool:
        """Go on from a changed configuration, where a model can be built of it."""
        other = self.with_changes(changes)
        if other.outline({}) is None:
            return False
        self.fields, self._cache, self._built = other.fields, other._cache, None
        self._modules = None
        self._defaults = other._defaults
        self.n_probes += other.n_probes
        return True

    def with_changes(self, changes: Changes) -> "Workbench":
        """Another one, of the changed configuration."""
        other = copy.copy(self)
        other.fields = config_changes.changed(self.fields, changes)
        other.n_probes, other._cache, other._defaults = 0, {}, {}
        other._built = other._modules = None
        return other

    def explicit(self, guess: int) -> None:
        """Give sizes that are null (n_inner: "as usual") a value, so that they can be probed."""
        before = self.base()
        for name, value in list(config_changes.leaves(self.fields)):
            if value is None and _OPTIONAL.search(name.rpartition(".")[2]):
                after = self.snapshot({name: guess})
                if (
                    after
                    and after.shapes.keys() == before.shapes.keys()
                    and (after.shapes != before.shapes)
                ):
                    self.adopt({name: guess})
                    before = self.base()

    def snapshot(self, changes: Changes) -> Snapshot | None:
        """The model with some fields changed; None where there can't be one."""
        return self._asked(changes, by_disk=True)

    def is_counted(self, field: str) -> bool:
        """Whether some modules are as many as a list has entries: one reads each of its layers."""
        entries = config_fields.field_value(self.fields, field)
        full = self.outline({})
        fewer = self.outline({field: entries[:-1]}) if isinstance(entries, list) else None
        if full is None or fewer is None or not isinstance(entries, list):
            return False
        return any(
            n == len(entries) and fewer.counts.get(start, 0) == n - 1
            for start, n in full.counts.items()
        )

    def mentions(self, word: str) -> bool:
        """Whether the module of the model's class, or of a part, has a word, in capitals or not."""
        if self._modules is None:  # A model is built for it, and asked about many words.
            parts = self.net().named_modules() if self.outline({}) else ()
            names = {self._net_class.__module__, *(type(part).__module__ for _, part in parts)}
            self._modules = tuple(name for name in names if name.startswith("transformers."))
        return any(word.lower() in _source(name) for name in self._modules)

    def is_built(self, changes: Changes) -> bool:
        """Whether a model can be built with these fields changed, and no others."""
        with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
            self._net(self._plainly(changes))
            return True
        return False

    def outline(self, changes: Changes) -> Snapshot | None:
        """The same by the names in the model: of a large one, many fewer than in its files."""
        return self._asked(changes, by_disk=False)

    def _asked(self, changes: Changes, *, by_disk: bool) -> Snapshot | None:
        key = repr(sorted(changes.items())), by_disk
        if key not in self._cache:
            snapshot = None
            for build in (self._plainly, self._with_lists, self._afterwards):
                with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
                    snapshot = self._shot(build(changes), by_disk=by_disk)
                    break
            self._cache[key] = snapshot
        return self._cache[key]

    def default(self, field: str, changes: Changes) -> int | None:
        """What the configuration class makes of a `field` that is not there."""
        key = field, repr(sorted(changes.items()))
        if key not in self._defaults:
            # Asked again for each text of a spec.
            self._defaults[key] = self._default(field, changes)
        return self._defaults[key]

    def _default(self, field: str, changes: Changes) -> int | None:
        with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
            fields = config_changes.changed(self.fields, {**changes, field: None})
            value = config_fields.field_value(self._config_class(**fields).to_dict(), field)
            return value if type(value) is int else None
        return None

    def _built_fields(self) -> Fields:
        """The configuration as the model has changed it: one entry a layer where there was one."""
        if self._built is None:
            self._built = _plain(self.net().config.to_dict()) if self.outline({}) else {}
        return self._built

    def flag(self, field: str) -> bool:
        """What a configuration without this field means."""
        with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
            finished = self._config_class(**config_changes.changed(self.fields, {field: None}))
            return bool(getattr(finished, field))
        return True

    def defaults(self) -> dict[str, object]:
        """The class's own configuration, where it has one."""
        return self.made_of({})

    def made_of(self, config: Fields) -> dict[str, object]:
        """The fields that the class makes of some of them; none where it refuses these."""
        with contextlib.suppress(Exception), optional.quiet(hide_warnings=True):
            return _plain(self._config_class(**copy.deepcopy(dict(config))).to_dict())
        return {}

    def net(self) -> Net:
        """The model itself, without memory."""
        with optional.quiet(hide_warnings=True):
            return self._net(self._config_class(**copy.deepcopy(self.fields)))

    def _plainly(self, changes: Changes) -> _Config:
        return self._config_class(**config_changes.changed(self.fields, changes))

    def _with_lists(self, changes: Changes) -> _Config:
        # One entry a layer: a longer stack needs longer lists.
        more = dict(changes)
        for name, value in changes.items():
            scope, old = name.rpartition(".")[0], config_fields.field_value(self.fields, name)
            if not isinstance(value, int):
                continue
            for leaf, entries in self.lists(scope).items():
                spread = layer_rules.unrolled(entries) or entries
                if len(spread) == old:
                    longer = [spread[i % old] for i in range(value)]
                    more[config_changes.joined(scope, leaf)] = (
                        longer if spread is entries else [[longer, 1]]
                    )
            layers = config_fields.field_value(
                self.fields, config_changes.joined(scope, "per_layer_config")
            )
            if isinstance(layers, dict) and type(old) is int:
                more[config_changes.joined(scope, "per_layer_config")] = {
                    str(at): v for k, v in layers.items() for at in range(int(k), value, old)
                }
        return self._config_class(**config_changes.changed(self.fields, more))

    def _afterwards(self, changes: Changes) -> _Config:
        # Validators and constructors that refuse a value are passed by on the finished config.
        finished = self._config_class(**copy.deepcopy(self.fields))
        for name, value in changes.items():
            scope, _, leaf = name.rpartition(".")
            owner: object = finished
            for part in filter(None, scope.split(".")):
                owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
            if isinstance(owner, dict):
                owner[leaf] = value
            elif isinstance(owner, list):
                owner[int(leaf)] = value
            else:
                setattr(owner, leaf, value)
        return finished

    def why(self) -> str:
        """What building the model of the configuration itself ends with."""
        try:
            with optional.quiet(hide_warnings=True):
                self._net(self._plainly({}))
        except Exception as error:
            return " ".join(str(error).split())[:300] or type(error).__name__
        return "no reason given"

    def _net(self, finished: _Config) -> Net:
        import torch

        self.n_probes += 1
        no_weights = optional.library("transformers.initialization").no_init_weights
        with torch.device("meta"), no_weights():
            net = self._net_class(finished)
        net.tie_weights()
        return net

    def _shot(self, finished: _Config, *, by_disk: bool) -> Snapshot:
        net = self._net(finished)
        shapes = self._disk_names.shapes(net) if by_disk else disk_names.shapes(net)
        attributes = {
            (path, name): value
            for path, module in net.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and name[0] != "_"
        }
        n_elements = sum(map(math.prod, shapes.values()))
        templates = frozenset(map(template, shapes))
        return Snapshot(shapes, attributes, templates, n_elements, _index_counts(shapes))


@lru_cache(maxsize=256)
def _source(module: str) -> str:
    """A module's text, in small letters."""
    with contextlib.suppress(OSError):
        return inspect.getsource(sys.modules[module]).lower()
    return ""


@lru_cache(maxsize=1 << 16)
def template(key: str) -> str:
    """A key with every number in it "*"."""
    return INDEX.sub("*", key)


def _index_counts(keys: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in keys:
        for number in INDEX.finditer(key):
            start = template(key[: number.start()])
            counts[start] = max(counts.get(start, 0), int(number[0]) + 1)
    return counts


def transformers_version() -> str:
    """The version that the models are from."""
    return str(getattr(optional.library("transformers"), "__version__", "?"))


def _config_class(config: Fields, name: str) -> tuple[str, _ConfigClass]:
    model_type = config.get("model_type")
    known = optional.library("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if isinstance(model_type, str) and model_type in known:
        return model_type, cast("_ConfigClass", known[model_type])
    if not isinstance(model_type, str):
        raise ArchitectureError(
            f"{name}: no model_type in its config.json", hint="write a spec by hand"
        )
    if "auto_map" in config:
        raise ArchitectureError(
            f"{name}: {model_type!r} brings its own code, which is never run",
            hint="write a spec by hand: streammap/architectures/README.md",
        )
    version = transformers_version()
    raise ArchitectureError(
        f"{name}: transformers {version} has no model type {model_type!r}",
        hint="update transformers, or write a spec by hand",
    )


def _net_class(finished: _Config, config: Fields, name: str) -> Callable[[_Config], Net]:
    found = model_class.find(config, finished)
    if found is None:
        raise ArchitectureError(
            f"{name}: transformers has no model class for {config.get('model_type')!r}",
            hint="name one in config.json's architectures, or write a spec by hand",
        )
    return cast("Callable[[_Config], Net]", found)


def _plain(value: Mapping[str, object]) -> dict[str, object]:
    """Nothing but what a constructor takes back."""
    return {
        k: _plain(v) if isinstance(v, dict) and k.endswith("_config") else v
        for k, v in config_changes.decoded(value).items()
        if k not in _DERIVED
    }
