"""What a model's own class says of a checkpoint, without its weights: "loaded" on the meta device.

    python -P -m streammap.output.loading.class_trial
        {"source": [config, shapes], "result": [config, shapes]} on stdin -> a verdict on stdout

transformers' loader does it itself, so that renamings, tied and ignored tensors count as they do
there. A process of its own is for callers that have not imported the library: its 380 MB and four
seconds are not theirs.
"""

import contextlib
import importlib
import importlib.util
import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol, cast

from streammap.architectures import key_pattern
from streammap.architectures.classes import model_class
from streammap.common import optional

Shape = tuple[int, ...]
Library = Literal["transformers", "timm"]
Shapes = Mapping[str, Shape]
Given = tuple[Mapping[str, object], Shapes]
"""A config.json, and the shapes of the tensors beside it by key."""
_MOST_NBYTES = 8 * 2**30


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a class says of one checkpoint."""

    class_name: str
    refusal: str = ""
    """Why there can be no such model; empty where there can."""
    wrong: Mapping[str, tuple[Shape | None, Shape | None]] = field(default_factory=dict)
    """Key -> the checkpoint's shape and the class's, where they differ; None where one has none."""

    @property
    def ok(self) -> bool:
        """Whether the class loads the checkpoint as it is."""
        return not self.refusal and not self.wrong

    def as_json(self) -> dict[str, object]:
        """All fields by name; `from_json` takes them back."""
        return {"class_name": self.class_name, "refusal": self.refusal, "wrong": dict(self.wrong)}

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> "Verdict":
        """A verdict of another process."""
        wrong = cast("Mapping[str, Sequence[Sequence[int] | None]]", content["wrong"])
        return cls(
            str(content["class_name"]),
            str(content["refusal"]),
            {key: (_shape(found), _shape(made)) for key, (found, made) in wrong.items()},
        )


def library_of(config: Mapping[str, object]) -> Library | None:
    """Whose class a config.json is of; None where it brings its own code, or names no class."""
    if "auto_map" in config:
        return None
    if isinstance(config.get("model_type"), str):
        return "transformers"
    return "timm" if isinstance(config.get("architecture"), str) else None


def is_installed(library: str) -> bool:
    """Whether a library can be imported; it is not."""
    return library in sys.modules or importlib.util.find_spec(library) is not None


def compare(source: Given | None, result: Given) -> Verdict | None:
    """What the result has wrong and its source had not; None where nothing can be said.

    A source may lack its head, or have tensors that its class doesn't know: that is no fault of the
    result. Tensors are told apart by their keys without numbers, since layers may be others.
    """
    verdict = trial(*result)
    if verdict is None or verdict.ok or source is None:
        return verdict
    before = trial(*source)
    if before is None or before.refusal:
        return None
    known = {key_pattern.INDEX.sub("*", key) for key in before.wrong}
    wrong = {
        key: pair
        for key, pair in verdict.wrong.items()
        if key_pattern.INDEX.sub("*", key) not in known
    }
    return Verdict(verdict.class_name, verdict.refusal, wrong)


def trial(config: Mapping[str, object], shapes: Shapes) -> Verdict | None:
    """What the class of a config.json says of tensors of these shapes.

    Returns:
        None where the library, or the class in it, is not there.
    """
    try:
        if library_of(config) == "timm":
            return _timm(config, shapes)
        with optional.quiet(hide_warnings=True):
            return _transformers(config, shapes)
    except _UnknownClassError:
        return None


class _UnknownClassError(Exception):
    """There is no class to ask."""


class _Tensor(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


class _Net(Protocol):
    def state_dict(self) -> Mapping[str, _Tensor]: ...


class _NetClass(Protocol):
    __name__: str

    def from_pretrained(
        self, name: None, **options: object
    ) -> tuple[_Net, Mapping[str, Sequence[object]]]: ...


def _transformers(config: Mapping[str, object], shapes: Shapes) -> Verdict:
    import torch

    # Whether numbers are quantised is nothing that shapes tell.
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    model_type = str(config.get("model_type"))
    auto = _module("transformers.models.auto.configuration_auto")
    if model_type not in auto.CONFIG_MAPPING:
        raise _UnknownClassError
    name = model_type
    try:
        with _config_folder(plain) as folder:
            finished = auto.AutoConfig.from_pretrained(folder, local_files_only=True)
        net_class = _net_class(config, finished)
        name = net_class.__name__
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]), _without_accelerate():
            net, found = net_class.from_pretrained(
                None,
                config=finished,
                state_dict=state,
                dtype=torch.float32,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except _UnknownClassError:
        raise
    except Exception as error:  # whatever a class raises that can't be built
        return Verdict(name, _told(error))
    made = {key: tuple(x.shape) for key, x in net.state_dict().items()}
    wrong: dict[str, tuple[Shape | None, Shape | None]] = {}
    for key in map(str, found["missing_keys"]):
        wrong[key] = (None, made.get(key, ()))
    for key in map(str, found["unexpected_keys"]):
        wrong[key] = (shapes.get(key), None)
    for entry in found["mismatched_keys"]:
        key, before, after = cast("tuple[str, Sequence[int], Sequence[int]]", entry)
        wrong[key] = (tuple(before), tuple(after))
    return Verdict(name, "", {key: wrong[key] for key in sorted(wrong, key=key_pattern.natural)})


def _net_class(config: Mapping[str, object], finished: object) -> _NetClass:
    found = model_class.find(config, finished)
    if found is None:
        raise _UnknownClassError
    return cast("_NetClass", found)


def _timm(config: Mapping[str, object], shapes: Shapes) -> Verdict:
    import torch

    name, timm = str(config["architecture"]), _module("timm")
    if not timm.is_model(name):
        raise _UnknownClassError
    create: Callable[[str], _Net] = timm.create_model
    try:
        with _config_folder(config) as folder, torch.device("meta"):
            net = create(f"local-dir:{folder}")
    except Exception as error:  # whatever a class raises that can't be built
        return Verdict(name, _told(error))
    made = {key: tuple(x.shape) for key, x in net.state_dict().items()}
    if "pos_embed" in made and shapes.get("pos_embed", ())[-1:] == made["pos_embed"][-1:]:
        made["pos_embed"] = shapes["pos_embed"]  # timm resamples positions as it loads them
    keys = (key for key in {**shapes, **made} if shapes.get(key) != made.get(key))
    return Verdict(name, "", {key: (shapes.get(key), made.get(key)) for key in keys})


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _UnknownClassError from error


@contextlib.contextmanager
def _without_accelerate() -> Iterator[None]:
    """Transformers asks for accelerate before it loads on any device, and does not need it here."""
    module = _module("transformers.integrations.accelerate")
    asks = module.is_accelerate_available
    module.is_accelerate_available = lambda *_: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.is_accelerate_available = asks  # type: ignore[attr-defined]


@contextlib.contextmanager
def _config_folder(config: Mapping[str, object]) -> Iterator[str]:
    """A folder with this config.json: what libraries read is then what they would read of it."""
    with tempfile.TemporaryDirectory(prefix="streammap-config-") as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        yield folder


def _told(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _shape(value: Sequence[int] | None) -> Shape | None:
    return None if value is None else tuple(value)


def _answer() -> None:
    """One question on stdin, its verdict on stdout."""
    answer, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    # config.json may be anybody's: what it asks for is not built without end.
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_NBYTES, _MOST_NBYTES))
    asked = json.load(sys.stdin)
    source = None if asked["source"] is None else _given(*asked["source"])
    verdict = compare(source, _given(*asked["result"]))
    json.dump(None if verdict is None else verdict.as_json(), answer)


def _given(config: Mapping[str, object], shapes: Mapping[str, Sequence[int]]) -> Given:
    return config, {key: tuple(shape) for key, shape in shapes.items()}


if __name__ == "__main__":
    _answer()
