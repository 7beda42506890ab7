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
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol, cast

from streammap.errors import ArchitectureError, PlanError
from streammap.pattern import INDEX

PartKind = Literal["linear", "conv1d", "conv", "embedding", "norm", "stack", "buffer", "other"]
Fields = Mapping[str, object]
"""config.json's content, or a part of it."""
Changes = Mapping[str, object]
"""Dotted field -> its value in place of the configuration's; None takes the field out."""

_AUTO = (
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "MODEL_MAPPING",
)  # fmt: skip
REBUILT = ("out_features", "out_indices", "stage_names")
"""Fields that a class makes again from the number of layers."""
_DERIVED = (
    "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", *REBUILT,
)  # fmt: skip
_MAX_LIST = 8
_LIST_SIZE = re.compile(r"dim|size|channels|width")
_NO_SIZE = re.compile(r"_ids?$|seed|version|^id2label|^label2id|^task_specific|^chunk_size_")
_RATIO = re.compile(r"ratio|mult|expan|factor")
_OPTIONAL = re.compile(r"dim|size|inner|heads|rank|width")


@dataclass(frozen=True, slots=True)
class Part:
    """The module behind a key."""

    kind: PartKind
    path: str
    """Of the module, in the model and not in its files."""
    parameter: str
    """Its name in the module."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One model, built without memory."""

    shapes: Mapping[str, tuple[int, ...]]
    """On-disk key -> shape."""
    attributes: Mapping[tuple[str, str], int]
    """(module, attribute) -> value, of those that are whole numbers."""

    templates: frozenset[str]
    """The keys, every number in them "*"."""
    counts: Mapping[str, int]
    """Beginning of keys up to a number ("layers.", "layers.*.experts.") -> the highest + 1."""


@dataclass(frozen=True, slots=True)
class NormFacts:
    """What a norm module does, seen from outside."""

    path: str
    kind: Literal["rms", "layer"]
    offset: float
    """It multiplies by this + its weight."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The model's parts."""

    parts: Mapping[str, Part]
    """On-disk key -> the module that it belongs to."""
    classes: Mapping[str, str]
    """Module path -> the name of its class."""
    keys: Mapping[str, str]
    """Module path -> the on-disk key of its weight; tied modules share one."""
    input_embedding: str | None
    output_embedding: str | None
    base: str
    """Path of the base model, "" where the model is one."""
    decoder: str
    """Path of what makes the head's input: the decoder, where there are two stacks."""
    tied: Mapping[str, str]
    """Keys that save_pretrained leaves out -> the on-disk key that holds their tensor."""
    norms: tuple[NormFacts, ...]
    """In the order in which the model has them."""


class _Config(Protocol):
    """A configuration of transformers, as far as it is used here."""

    def to_dict(self) -> dict[str, object]: ...


_ConfigClass = Callable[..., _Config]


class _Tensor(Protocol):
    """A tensor, as far as it is used here."""

    @property
    def shape(self) -> Sequence[int]: ...


class _Module(Protocol):
    """A module of torch."""

    def named_modules(self) -> Iterator[tuple[str, "_Module"]]: ...
    def named_parameters(self, *, recurse: bool) -> Iterator[tuple[str, _Tensor]]: ...
    def named_buffers(self, *, recurse: bool) -> Iterator[tuple[str, _Tensor]]: ...


class _Net(_Module, Protocol):
    """A model of transformers."""

    base_model_prefix: str
    _keys_to_ignore_on_save: Iterable[str] | None

    @property
    def base_model(self) -> _Module: ...
    def tie_weights(self) -> None: ...
    def state_dict(self) -> dict[str, _Tensor]: ...
    def get_input_embeddings(self) -> _Module: ...
    def get_output_embeddings(self) -> _Module | None: ...


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
        given = _decoded({k: v for k, v in config.items() if k not in ("auto_map", "dtype")})
        self.model_type, self._config_class = _config_class(config, name)
        self.n_probes = 0
        self._cache: dict[str, Snapshot | None] = {}
        try:
            with quiet():
                finished = self._config_class(**copy.deepcopy(given))
                self._net_class = _net_class(finished, config, name)
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
        found = self.snapshot({})
        if found is None:
            raise ArchitectureError(
                f"{self._name}: {self.class_name} can't be built: {self._why()}",
                hint="check config.json, or write a spec by hand",
            )
        return found

    def numbers(self) -> tuple[Field, ...]:
        """The fields that may be sizes."""
        found = []
        for name, value in leaves(self.fields):
            leaf = name.rpartition(".")[2]
            if isinstance(value, bool) or _NO_SIZE.search(leaf):
                continue
            if isinstance(value, list) and 0 < len(value) <= _MAX_LIST and _LIST_SIZE.search(leaf):
                name, value = f"{name}.-1", value[-1]
            whole = isinstance(value, int) and value > 0
            ratio = isinstance(value, float) and value >= 1 and value.is_integer()
            if whole or (ratio and _RATIO.search(leaf)):
                found.append(Field(name, int(cast("float", value))))
        return tuple(found)

    def lists(self, scope: str) -> dict[str, list[object]]:
        """The list-valued fields of one part of the configuration."""
        inside = value_at(self.fields, scope) if scope else self.fields
        entries = inside.items() if isinstance(inside, dict) else ()
        return {k: v for k, v in entries if isinstance(v, list)}

    def adopt(self, changes: Changes) -> bool:
        """Go on from a changed configuration, where a model can be built of it."""
        if self.snapshot(changes) is None:
            return False
        self.fields = changed(self.fields, changes)
        self._cache.clear()
        return True

    def explicit(self, guess: int) -> None:
        """Give sizes that stand for "as usual" (n_inner = None) a value, so that they can be probed."""
        before = self.base()
        for name, value in list(leaves(self.fields)):
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
        key = repr(sorted(changes.items()))
        if key not in self._cache:
            found = None
            for build in (self._plainly, self._with_lists, self._afterwards):
                with contextlib.suppress(Exception), quiet():
                    found = build(changes)
                    break
            self._cache[key] = found
        return self._cache[key]

    def default(self, field: str, changes: Changes) -> int | None:
        """What the configuration class makes of a `field` that is not there."""
        with contextlib.suppress(Exception), quiet():
            fields = changed(self.fields, {**changes, field: None})
            found = value_at(self._config_class(**fields).to_dict(), field)
            return found if isinstance(found, int) and not isinstance(found, bool) else None
        return None

    def flag(self, field: str) -> bool:
        """What a configuration without this field means."""
        with contextlib.suppress(Exception), quiet():
            finished = self._config_class(**changed(self.fields, {field: None}))
            return bool(getattr(finished, field))
        return True

    def defaults(self) -> dict[str, object]:
        """The class's own configuration, where it has one."""
        with contextlib.suppress(Exception), quiet():
            return _plain(self._config_class().to_dict())
        return {}

    def anatomy(self) -> Anatomy:
        """The parts of the model."""
        with quiet():
            net = self._net(self._config_class(**copy.deepcopy(self.fields)))
            return _anatomy(net)

    def _plainly(self, changes: Changes) -> Snapshot:
        return self._shot(self._config_class(**changed(self.fields, changes)))

    def _with_lists(self, changes: Changes) -> Snapshot:
        # One entry a layer: a longer stack needs longer lists.
        more = dict(changes)
        for name, value in changes.items():
            scope, old = name.rpartition(".")[0], value_at(self.fields, name)
            if not isinstance(value, int):
                continue
            for leaf, entries in self.lists(scope).items():
                spread = _spread(entries)
                if len(spread) == old:
                    longer = [spread[i % old] for i in range(value)]
                    more[_joined(scope, leaf)] = longer if spread is entries else [[longer, 1]]
            layers = value_at(self.fields, _joined(scope, "per_layer_config"))
            if isinstance(layers, dict) and type(old) is int:
                more[_joined(scope, "per_layer_config")] = {
                    str(at): v for k, v in layers.items() for at in range(int(k), value, old)
                }
        return self._shot(self._config_class(**changed(self.fields, more)))

    def _afterwards(self, changes: Changes) -> Snapshot:
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
        return self._shot(finished)

    def _why(self) -> str:
        try:
            with quiet():
                self._plainly({})
        except Exception as error:  # noqa: BLE001  whatever it is, it is told
            return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return "no reason given"

    def _net(self, finished: _Config) -> _Net:
        import torch

        self.n_probes += 1
        no_weights = _transformers("transformers.initialization").no_init_weights
        with torch.device("meta"), no_weights():
            net = self._net_class(finished)
        net.tie_weights()
        return net

    def _shot(self, finished: _Config) -> Snapshot:
        net = self._net(finished)
        shapes = {k: tuple(x.shape) for k, x in _on_disk(net, _saved(net)).items()}
        attributes = {
            (path, name): value
            for path, module in net.named_modules()
            for name, value in vars(module).items()
            if type(value) is int and name[0] != "_"
        }
        return Snapshot(shapes, attributes, frozenset(map(template, shapes)), _index_counts(shapes))


def template(key: str) -> str:
    """A key with every number in it "*"."""
    return INDEX.sub("*", key)


def _index_counts(keys: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for key in keys:
        for number in INDEX.finditer(key):
            start = template(key[: number.start()])
            found[start] = max(found.get(start, 0), int(number[0]) + 1)
    return found


def value_at(fields: object, name: str) -> object:
    """The value of a dotted field, or None."""
    for part in name.split("."):
        if isinstance(fields, list) and re.fullmatch(r"-?\d+", part):
            fields = fields[int(part)] if int(part) < len(fields) else None
        else:
            fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def changed(fields: Fields, changes: Changes) -> dict[str, object]:
    """A copy with the fields changed; None takes a field out."""
    found = copy.deepcopy(dict(fields))
    for name, value in changes.items():
        *scope, leaf = name.split(".")
        owner = found
        for part in scope:
            owner = cast("dict[str, object]", owner[part])
        if isinstance(owner, list):
            owner[int(leaf)] = value
        elif value is None:
            owner.pop(leaf, None)
        else:
            owner[leaf] = value
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word from transformers inside."""
    logging = _transformers("transformers.utils.logging")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def transformers_version() -> str:
    """The version that the models are from."""
    return str(getattr(_transformers(), "__version__", "?"))


def _transformers(module: str = "transformers") -> ModuleType:
    # By name: its annotations are partial, and differ from version to version.
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlanError(
            "a spec is inferred with transformers, which is not installed or too old",
            hint="pip install -U 'streammap[transformers]'",
        ) from error


def _config_class(config: Fields, name: str) -> tuple[str, _ConfigClass]:
    model_type = config.get("model_type")
    known = _transformers("transformers.models.auto.configuration_auto").CONFIG_MAPPING
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


def _net_class(finished: _Config, config: Fields, name: str) -> Callable[[_Config], _Net]:
    named = config.get("architectures")
    for class_name in named if isinstance(named, list) else ():
        found = getattr(_transformers(), str(class_name), None)
        if isinstance(found, type) and hasattr(found, "base_model_prefix"):
            return cast("Callable[[_Config], _Net]", found)
    auto = _transformers("transformers.models.auto.modeling_auto")
    for mapping in _AUTO:
        options = getattr(auto, mapping, {})
        if type(finished) in options:
            found = options[type(finished)]
            first = found[0] if isinstance(found, (list, tuple)) else found
            return cast("Callable[[_Config], _Net]", first)
    raise ArchitectureError(
        f"{name}: transformers has no model class for {config.get('model_type')!r}",
        hint="name one in config.json's architectures, or write a spec by hand",
    )


def _decoded(value: Mapping[str, object]) -> dict[str, object]:
    """transformers' own way to write an infinite number, read again."""

    def one(value: object) -> object:
        if isinstance(value, dict):
            if value.keys() == {"__float__"}:
                return float(str(value["__float__"]))
            return {k: one(v) for k, v in value.items()}
        return [one(v) for v in value] if isinstance(value, list) else value

    return {k: one(v) for k, v in value.items()}


def _plain(value: Mapping[str, object]) -> dict[str, object]:
    """Nothing but what a constructor takes back."""
    return {
        k: _plain(v) if isinstance(v, dict) and k.endswith("_config") else v
        for k, v in _decoded(value).items()
        if k not in _DERIVED
    }


def _joined(scope: str, leaf: str) -> str:
    return f"{scope}.{leaf}" if scope else leaf


def _spread(entries: list[object]) -> list[object]:
    """One entry a layer, of GPT-Neo's [[["global", "local"], 12]] too."""
    pairs = [e for e in entries if isinstance(e, list) and len(e) == 2 and isinstance(e[0], list)]
    if not pairs or len(pairs) != len(entries) or not all(isinstance(e[1], int) for e in pairs):
        return entries
    return [kind for kinds, times in pairs for kind in kinds * times]


def leaves(fields: Fields, before: str = "") -> Iterator[tuple[str, object]]:
    """Every field with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, dict):
            if not _NO_SIZE.search(name) and all(isinstance(k, str) for k in value):
                yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def _saved(net: _Net) -> dict[str, _Tensor]:
    state = net.state_dict()
    for key in net._keys_to_ignore_on_save or ():  # noqa: SLF001  save_pretrained goes by it
        state.pop(key, None)
    modeling = _transformers("transformers.modeling_utils")
    found: dict[str, _Tensor] = modeling.remove_tied_weights_from_state_dict(state, net)
    return found


def _on_disk(net: _Net, state: dict[str, _Tensor]) -> dict[str, _Tensor]:
    loading = _transformers("transformers.core_model_loading")
    found: dict[str, _Tensor] = loading.revert_weight_conversion(net, state)
    return found


def _traced(net: _Net, state: dict[str, _Tensor]) -> dict[str, str]:
    """On-disk key -> the key in the model that its tensor is made of, the first of several."""
    import torch
    from torch.overrides import TorchFunctionMode

    sources = {id(x): key for key, x in state.items()}
    kept: list[object] = []  # an id counts as long as its tensor lives

    class Trace(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., object],
            types: object,
            args: Sequence[object] = (),
            kwargs: Mapping[str, object] | None = None,
        ) -> object:
            result = func(*args, **(kwargs or {}))
            inside = [sources[id(x)] for x in _flat((args, kwargs)) if id(x) in sources]
            for x in _flat(result):
                if inside and isinstance(x, torch.Tensor):
                    sources.setdefault(id(x), inside[0])
                    kept.append(x)
            return result

    with Trace():
        found = _on_disk(net, state)
    return {key: sources[id(x)] for key, x in found.items() if id(x) in sources}


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _flat(entry)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _anatomy(net: _Net) -> Anatomy:
    modules = dict(net.named_modules())
    path_of = {id(module): path for path, module in modules.items()}
    state = _saved(net)
    traced = _traced(net, state)
    tied = _tied(net, {inner: key for key, inner in reversed(traced.items())})
    parts = {}
    for key, inner in (*traced.items(), *((key, key) for key in tied)):
        path, _, parameter = inner.rpartition(".")
        rank = len(state[inner].shape) if inner in state else 2
        parts[key] = Part(_kind(modules[path], path, rank, parameter), path, parameter)
    first = {(p.path, p.parameter): k for k, p in reversed(parts.items()) if k not in tied}
    keys = {path: first[path, "weight"] for path in modules if (path, "weight") in first}
    embedding, head = _embeddings(net)
    into = None if embedding is None else path_of.get(id(embedding))
    out = None if head is None else path_of.get(id(head))
    base = path_of.get(id(net.base_model), "")
    return Anatomy(
        parts=parts,
        classes={path: type(module).__name__ for path, module in modules.items()},
        keys=keys,
        input_embedding=into,
        output_embedding=out,
        base=base,
        decoder=next((p for p in (f"{base}.decoder".lstrip("."),) if p in modules), base),
        tied=tied,
        norms=tuple(
            facts
            for path, module in modules.items()
            if "norm" in type(module).__name__.lower()
            and (facts := _norm_facts(module, path)) is not None
        ),
    )


def _tied(net: _Net, on_disk: Mapping[str, str]) -> dict[str, str]:
    """The second names of tensors, as the model has them."""
    first: dict[int, str] = {}
    found = {}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            first.setdefault(id(parameter), "")
            key = f"{path}.{name}".lstrip(".")
            if key in on_disk:
                first[id(parameter)] = on_disk[key]
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{path}.{name}".lstrip(".")
            if key not in on_disk and first[id(parameter)]:
                found[key] = first[id(parameter)]
    return found


def _embeddings(net: _Net) -> tuple[_Module | None, _Module | None]:
    found: list[_Module | None] = []
    for getter in (net.get_input_embeddings, net.get_output_embeddings):
        module = None
        with contextlib.suppress(Exception):
            module = getter()
        found.append(module)
    return found[0], found[1]


def _kind(module: _Module, path: str, rank: int, parameter: str) -> PartKind:
    from torch import nn

    name = type(module).__name__
    if parameter in {n for n, _ in module.named_buffers(recurse=False)}:
        return "buffer"
    if "expert" in f"{path}.{name}".lower() and (rank == 3 or (rank == 2 and "bias" in parameter)):
        return "stack"
    if isinstance(module, nn.Linear):
        return "linear"
    if name == "Conv1D":
        return "conv1d"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in name.lower() and parameter in ("weight", "bias"):
        return "norm"
    return "linear" if rank == 2 and parameter in ("weight", "in_proj_weight") else "other"


def _norm_facts(module: _Module, path: str) -> NormFacts | None:
    """Whether a norm takes the mean away, and what it adds to its weight: by trying it."""
    import torch

    width = next(
        (x.shape[-1] for n, x in module.named_parameters(recurse=False) if n == "weight"), 0
    )
    if not width or width > 1 << 20:
        return None
    with contextlib.suppress(Exception), torch.no_grad():
        norm = cast("torch.nn.Module", copy.deepcopy(module)).to_empty(device="cpu").float()
        for parameter in norm.parameters():
            parameter.zero_()
        x = torch.linspace(-1, 2, width).reshape(1, 1, -1)
        weight = cast("torch.Tensor", norm.weight)
        none = norm(x)
        weight.fill_(1.0)
        one, moved = norm(x), norm(x + 5.0)
        span = (one - none).abs().max()
        offset = float(none.abs().max() / span) if span else 0.0
        same = torch.allclose(one, moved, atol=1e-3)
        return NormFacts(path, "layer" if same else "rms", round(offset, 3))
    return None
