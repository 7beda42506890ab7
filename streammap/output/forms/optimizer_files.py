"""An optimizer's state as torch stores it: optimizer.pt, or beside the model in a DCP folder.

optimizer.pt is what torch.save(optimizer.state_dict()) writes, and transformers' Trainer looks for.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from streammap.io.dtypes import TensorSpec
from streammap.io.formats import pickle_writer, torch_writer
from streammap.io.formats.pickle_writer import dict_, list_, number, text
from streammap.output.forms import torch_files
from streammap.output.layout import Shard
from streammap.planning.optimizer.state import OptimizerState

NAME = "optimizer.pt"


def arrange(state: OptimizerState, specs: Mapping[str, TensorSpec]) -> Shard:
    """The file of a state.

    Args:
        specs: Key -> dtype and shape, of the state's tensors.

    Raises:
        OutputError: a dtype that torch lacks.
    """
    torch_files.check(specs)
    pairs = list(specs.items())
    stored = {key: torch_writer.tensor(spec, str(i)) for i, (key, spec) in enumerate(pairs)}
    small, entries = torch_writer.small_entries(_pickled(state, stored))
    slots = torch_writer.place(pairs, small)
    around = partial(torch_writer.around, slots, small, entries)
    ((_, table),) = deque(around(), maxlen=1)
    return Shard(NAME, small, slots, len(table), around)


def _pickled(state: OptimizerState, stored: Mapping[str, bytes]) -> bytes:
    numbers = {name: i for i, name in enumerate(state.names)}
    kept: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in numbers}
    for key, (name, what) in state.entries.items():
        kept[name].append((text(what), stored[key]))
    groups = []
    for group in state.groups:
        items = [(text(name), pickle_writer.value(v)) for name, v in group.options.items()]
        params = list_(*(number(numbers[name]) for name in group.names))
        items.append((text("params"), params))
        # Also where the source had none: so that the result needs no class to be read again.
        items.append((text("param_names"), list_(*map(text, group.names))))
        groups.append(dict_(items))
    table = [(number(numbers[name]), dict_(items)) for name, items in kept.items()]
    return dict_(((text("state"), dict_(table)), (text("param_groups"), list_(*groups))))


class DcpObject(NamedTuple):
    """An entry of a DCP folder that is no tensor."""

    path: tuple[str | int, ...]
    stream: bytes
    """As torch.save writes it."""


def dcp_path(state: OptimizerState, name: str, what: str) -> tuple[str | int, ...]:
    """Where an entry of a parameter's state stands in a state dict."""
    nest = _nest(state)
    return (*nest, f"state.{name}.{what}") if state.form.is_flat else (*nest, "state", name, what)


def dcp_objects(state: OptimizerState) -> Iterator[DcpObject]:
    """The groups."""
    nest = _nest(state)
    for i, group in enumerate(state.groups):
        for option, value in group.options.items():
            stream = torch_writer.saved(pickle_writer.value(value))
            if not state.form.is_flat:
                yield DcpObject((*nest, "param_groups", i, option), stream)
                continue
            for name in group.names:
                yield DcpObject((*nest, f"param_groups.{name}.{option}"), stream)
        if not state.form.is_flat:
            names = torch_writer.saved(list_(*map(text, group.names)))
            yield DcpObject((*nest, "param_groups", i, "params"), names)


def _nest(state: OptimizerState) -> tuple[str, ...]:
    return tuple(state.form.nest.split(".")) if state.form.nest else ()
