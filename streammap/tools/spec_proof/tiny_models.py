"""Tiny random models of transformers and timm: made, saved, loaded again strictly, run.

All of it is strict float64. transformers casts norms, softmax, rotary angles and routers to
float32, so that a model in float64 computes to 1e-7 only; here who asks torch for float32 gets
float64, and equal functions are equal to 1e-12.
"""

import contextlib
import importlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from streammap.architectures.schema import TinyModel
from streammap.common import optional
from streammap.errors import PlanError, some
from streammap.tools.spec_proof import inputs

_TIMM = "timm:"
"""What a class of timm begins with: "timm:VisionTransformer"."""
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
_POSITIONS = re.compile("Sinus|SinePosition|PositionalEncoding")
"""Classes of modules that compute positions."""
_BATCH = 2
_SPREAD = 1.5
"""Weights are this / sqrt(fan-in): attention and routers choose, and nothing saturates."""


def build(model: TinyModel, folder: Path, *, seed: int = 0) -> None:
    """Make a model with random weights, and save it as its library does.

    Raises:
        PlanError: its library is not installed, or has no such class.
    """
    with _strict(seed):
        if model.class_name.startswith(_TIMM):
            image_model = _timm_model(model, model.config)
            _randomize(image_model)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(image_model.state_dict(), folder / _WEIGHTS)
            content = {"num_features": model.config["embed_dim"], "model_args": {**model.config}}
            (folder / _CONFIG).write_text(json.dumps(content))
            return
        with optional.quiet():
            kind = _class_of(model)
            net = kind._from_config(
                kind.config_class(**model.config), dtype=torch.float64, **_EAGER
            )
            _widen(net)
            _randomize(net)
            net.save_pretrained(folder)


def outputs(folder: Path, model: TinyModel, *, seed: int = 0) -> dict[str, Tensor]:
    """What the model of a folder computes from fixed inputs; nothing if it is `shapes_only`.

    The logits; of a model without any, its hidden states and embeddings.

    Raises:
        PlanError: keys that are missing, left over, or of another shape.
    """
    with _strict(seed):
        if model.class_name.startswith(_TIMM):
            image_model = _load_timm(folder, model)
            side = image_model.patch_embed.img_size[0]
            torch.manual_seed(seed)
            with torch.no_grad():
                return {"logits": image_model(torch.randn(_BATCH, 3, side, side))}
        with optional.quiet():
            net = _load(folder, model)
            if model.shapes_only:
                return {}
            torch.manual_seed(seed)  # What loading drew depends on the sizes.
            with _without(model.neutral, net), torch.no_grad():
                result = net(**inputs.make(net))
    tensors = _named(result)
    if not tensors:
        raise PlanError(f"{model.class_name} gives no tensors", hint="set shapes_only = true")
    return {k: x for k, x in tensors.items() if "logits" in k} or tensors


@contextlib.contextmanager
def training(
    folder: Path, model: TinyModel, *, seed: int = 0, score: Callable[[Tensor], Tensor]
) -> "Iterator[tuple[torch.nn.Module, Callable[[], Tensor]]]":
    """The model of a folder, to be trained on fixed inputs, and its loss: `score` of all logits.

    Raises:
        PlanError: keys that are missing, left over, or of another shape; no logits.
    """
    with _strict(seed), optional.quiet():
        net = _load(folder, model)
        torch.manual_seed(seed)
        given = inputs.make(net)

        def loss() -> Tensor:
            logits = [x for name, x in _named(net(**given)).items() if "logits" in name]
            if not logits:
                raise PlanError(f"{model.class_name} gives no logits")
            return torch.stack([score(x) for x in logits]).sum()

        with _without(model.neutral, net):
            yield cast("torch.nn.Module", net), loss


def save(net: torch.nn.Module, folder: Path) -> None:
    """Save a model as its library does."""
    cast("_Net", net).save_pretrained(folder)


class _Module(Protocol):
    """A torch module, as far as it is used here."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def modules(self) -> Iterator[torch.nn.Module]: ...
    def state_dict(self) -> dict[str, Tensor]: ...


class _Net(_Module, Protocol):
    """A model of transformers."""

    config: Any
    forward: Callable[..., object]

    def eval(self) -> "_Net": ...
    def save_pretrained(self, folder: Path) -> None: ...
    def __call__(self, **inputs: Tensor) -> Mapping[str, object]: ...


class _NetClass(Protocol):
    """A model class of transformers."""

    config_class: Callable[..., object]

    def _from_config(self, config: object, **options: object) -> _Net: ...
    def from_pretrained(
        self, folder: Path, **options: object
    ) -> tuple[_Net, Mapping[str, set[object]]]: ...


class _Patches(Protocol):
    img_size: tuple[int, int]


class _ImageModel(_Module, Protocol):
    """A model of timm."""

    patch_embed: _Patches

    def eval(self) -> "_ImageModel": ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> object: ...
    def __call__(self, images: Tensor) -> Tensor: ...


def _load(folder: Path, model: TinyModel) -> _Net:
    net, found = _class_of(model).from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, **_EAGER
    )
    wrong = [f"{what}: {some(sorted(map(str, keys)))}" for what, keys in found.items() if keys]
    if wrong:
        raise PlanError("; ".join(wrong))
    _widen(net)
    return net.eval()


def _widen(net: _Net) -> None:
    """Copies of all numbers, in float64 even where a class makes torch.FloatTensor.

    At the same alignment sums are the same to the last bit, wherever the file has them.
    """
    for _, x in (*net.named_parameters(), *net.named_buffers()):
        x.data = x.data.double() if x.dtype is torch.float32 else x.data.clone()


def _class_of(model: TinyModel) -> _NetClass:
    library = optional.library("transformers")
    try:
        found: _NetClass = getattr(library, model.class_name)
    except (AttributeError, ImportError) as error:
        raise PlanError(f"transformers has no class {model.class_name}: {error}") from error
    return found


def _load_timm(folder: Path, model: TinyModel) -> _ImageModel:
    arguments = json.loads((folder / _CONFIG).read_text())["model_args"]
    net = _timm_model(model, arguments)
    net.load_state_dict(load_file(folder / _WEIGHTS))
    return net


def _timm_model(model: TinyModel, arguments: Mapping[str, object]) -> _ImageModel:
    library = optional.library("timm.models.vision_transformer")
    kind: Callable[..., _ImageModel] = getattr(library, model.class_name.removeprefix(_TIMM))
    return kind(**arguments).eval()


def _randomize(model: _Module) -> None:
    """Random weights, gains and biases, in place: with gains 1 and biases 0, wrong rules pass."""
    saved = model.state_dict()
    parameters = dict(model.named_parameters())
    parameters |= {name: x for name, x in model.named_buffers() if name in saved}
    with torch.no_grad():
        for name, x in parameters.items():
            if not x.is_floating_point() or name.endswith("inv_freq"):
                continue
            if x.numel() == max(x.shape, default=1) or name.endswith("A_log"):
                # Around what it begins with: gains at 1 (or 0, for 1 + gain), biases at 0.
                x += torch.rand_like(x) - 0.5
            else:
                fan_in = x[0].numel() if x.dim() > 3 else x.shape[-1]
                x.normal_(std=_SPREAD / math.sqrt(fan_in))


def _named(result: Mapping[str, object]) -> dict[str, Tensor]:
    """The numbers of an answer; channels come last in all of them."""
    tensors = {k: x for k, x in result.items() if isinstance(x, Tensor) and x.is_floating_point()}
    maps, deep = result.get("feature_maps"), result.get("deepstack_features")
    for i, x in enumerate(maps if isinstance(maps, tuple) else ()):
        tensors[f"feature_maps.{i}"] = x.movedim(1, -1)
    for i, x in enumerate(deep if isinstance(deep, list) else ()):
        tensors[f"deepstack_features.{i}"] = x
    return tensors


@contextlib.contextmanager
def _without(features: Sequence[str], net: _Net) -> Iterator[None]:
    """The model with what it computes from positions set to zero."""
    with contextlib.ExitStack() as stack:
        if "sinusoidal" in features:
            for part in net.modules():
                if _POSITIONS.search(type(part).__name__):
                    stack.callback(part.register_forward_hook(_zeros).remove)
                for name, x in _computed(part):
                    stack.callback(setattr, part, name, x)
                    setattr(part, name, torch.zeros_like(x))
        if "alibi" in features:
            # The slopes come from functions of the model's own module.
            module = importlib.import_module(type(net).__module__)
            for name, function in list(vars(module).items()):
                if "alibi" in name and inspect.isfunction(function):
                    stack.callback(setattr, module, name, function)
                    setattr(module, name, _zeroed(function))
        yield


def _computed(part: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Tables of positions that no file has."""
    saved = part.state_dict()
    tensors = {**vars(part), **dict(part.named_buffers(recurse=False))}
    return [
        (name, x)
        for name, x in tensors.items()
        if isinstance(x, Tensor)
        and re.search("position|pos_enc", name)
        and x.is_floating_point()
        and name not in saved
    ]


def _zeros(part: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _zeroed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: torch.zeros_like(function(*args, **options))


@contextlib.contextmanager
def _strict(seed: int) -> Iterator[None]:
    """Strict float64, fixed random numbers, one thread and no warnings, inside only."""
    default, n_threads = torch.get_default_dtype(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _InFloat64():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        # The tensors are so small that further threads only wait for one another.
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)
            torch.set_default_dtype(default)


class _InFloat64(TorchFunctionMode):
    """Who asks torch for float32 gets float64."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is Tensor.float:
            func = Tensor.double
        if func is Tensor.masked_scatter:
            _refuse_other_width(args[0], (kwargs or {}).get("source", args[-1]))
        named = {k: _widened(x) for k, x in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _refuse_other_width(tokens: object, features: object) -> None:
    """Features that take the places of tokens are as wide as these.

    torch asks only that there are enough numbers: of wider features it would fill in the first.

    Raises:
        PlanError: they are not.
    """
    if not (isinstance(tokens, Tensor) and isinstance(features, Tensor) and features.dim() > 1):
        return
    if features.shape[-1] != tokens.shape[-1]:
        raise PlanError(
            f"features as wide as {features.shape[-1]} can't take the places of tokens, which are "
            f"as wide as {tokens.shape[-1]}"
        )


def _widened(given: object) -> object:
    return torch.float64 if given is torch.float32 else given
