"""The modules behind a model's keys: what they are, and what their norms do."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from streammap.tools.spec_infer.disk_names import MetaTensor, on_disk, saved
from streammap.tools.spec_infer.probe import Module, Net

PartKind = Literal["linear", "conv1d", "conv", "embedding", "norm", "stack", "buffer", "other"]


@dataclass(frozen=True, slots=True)
class ModulePart:
    """The module behind a key."""

    kind: PartKind
    path: str
    """Of the module, in the model and not in its files."""
    parameter: str
    """Its name in the module."""


@dataclass(frozen=True, slots=True)
class NormFacts:
    """What a norm module does, seen from outside."""

    path: str
    kind: Literal["rms", "layer"]
    offset: float
    """It multiplies by this + its weight."""


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The model's parts."""

    parts: Mapping[str, ModulePart]
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


def _traced(net: Net, state: dict[str, MetaTensor]) -> dict[str, str]:
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
        saved_tensors = on_disk(net, state)
    return {key: sources[id(x)] for key, x in saved_tensors.items() if id(x) in sources}


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _flat(entry)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def describe_model(net: Net) -> ModelStructure:
    """The parts of a model."""
    modules = dict(net.named_modules())
    path_of = {id(module): path for path, module in modules.items()}
    state = saved(net)
    traced = _traced(net, state)
    tied = _tied(net, {inner: key for key, inner in reversed(traced.items())})
    parts = {}
    for key, inner in (*traced.items(), *((key, key) for key in tied)):
        path, _, parameter = inner.rpartition(".")
        rank = len(state[inner].shape) if inner in state else 2
        parts[key] = ModulePart(_kind(modules[path], path, rank, parameter), path, parameter)
    first = {(p.path, p.parameter): k for k, p in reversed(parts.items()) if k not in tied}
    keys = {path: first[path, "weight"] for path in modules if (path, "weight") in first}
    embedding, head = _embeddings(net)
    into = None if embedding is None else path_of.get(id(embedding))
    out = None if head is None else path_of.get(id(head))
    base = path_of.get(id(net.base_model), "")
    return ModelStructure(
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


def _tied(net: Net, on_disk: Mapping[str, str]) -> dict[str, str]:
    """The second names of tensors, as the model has them."""
    first: dict[int, str] = {}
    second = {}
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
                second[key] = first[id(parameter)]
    return second


def _embeddings(net: Net) -> tuple[Module | None, Module | None]:
    modules: list[Module | None] = []
    for getter in (net.get_input_embeddings, net.get_output_embeddings):
        module = None
        with contextlib.suppress(Exception):
            module = getter()
        modules.append(module)
    return modules[0], modules[1]


def _kind(module: Module, path: str, rank: int, parameter: str) -> PartKind:
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
    if isinstance(module, nn.Embedding) or (name.endswith("Embedding") and parameter == "weight"):
        return "embedding"
    if "norm" in name.lower() and parameter in ("weight", "bias"):
        return "norm"
    return "linear" if rank == 2 and parameter in ("weight", "in_proj_weight") else "other"


def _norm_facts(module: Module, path: str) -> NormFacts | None:
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

        def made(x: torch.Tensor) -> torch.Tensor:
            found = norm(x)  # I-BERT's gives a scale beside it.
            return cast("torch.Tensor", found[0] if isinstance(found, tuple) else found)

        none = made(x)
        weight.fill_(1.0)
        one, moved = made(x), made(x + 5.0)
        span = (one - none).abs().max()
        offset = float(none.abs().max() / span) if span else 0.0
        same = torch.allclose(one, moved, atol=1e-3)
        return NormFacts(path, "layer" if same else "rms", round(offset, 3))
    return None
