"""The tensors of a model as its files hold them: what is saved, under which names.

A library may save tensors by other names than the model has, or in parts. It asks this of every key
anew, which takes longer than building a model does; `DiskNames` asks once for each key that is
renamed and nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from streammap.common import optional


class MetaTensor(Protocol):
    """A tensor, as far as it is used here."""

    @property
    def shape(self) -> Sequence[int]:
        """Its size in each dimension."""
        ...


class Saved(Protocol):
    """A model, as far as it is saved."""

    _keys_to_ignore_on_save: Iterable[str] | None

    def state_dict(self) -> dict[str, MetaTensor]:
        """Parameters and buffers by key."""
        ...


def saved(net: Saved) -> dict[str, MetaTensor]:
    """The tensors that save_pretrained keeps, by their names in the model."""
    state = net.state_dict()
    for key in net._keys_to_ignore_on_save or ():
        state.pop(key, None)
    modeling = optional.library("transformers.modeling_utils")
    found: dict[str, MetaTensor] = modeling.remove_tied_weights_from_state_dict(state, net)
    return found


def on_disk(net: Saved, state: Mapping[str, MetaTensor]) -> dict[str, MetaTensor]:
    """The tensors as files hold them."""
    loading = optional.library("transformers.core_model_loading")
    found: dict[str, MetaTensor] = loading.revert_weight_conversion(net, {**state})
    return found


def shapes(net: Saved) -> dict[str, tuple[int, ...]]:
    """Key in the model -> shape, of the tensors that are saved."""
    return {key: tuple(x.shape) for key, x in saved(net).items()}


class DiskNames:
    """The names in files of one class's tensors, remembered from model to model."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._renamed: dict[str, str] = {}
        self._order: dict[str, int] = {}

    def shapes(self, net: Saved) -> dict[str, tuple[int, ...]]:
        """On-disk key -> shape, in the order in which the library names them."""
        state = saved(net)
        asked = {key: x for key, x in state.items() if key not in self._renamed}
        found = on_disk(net, asked) if asked else {}
        shapes = {self._renamed[k]: tuple(x.shape) for k, x in state.items() if k not in asked}
        shapes |= {key: tuple(x.shape) for key, x in found.items()}
        # A tensor that comes back as it was is only renamed, and by its key alone.
        inner = {id(x): key for key, x in asked.items()}
        self._renamed |= {inner[id(x)]: key for key, x in found.items() if id(x) in inner}
        for key in found:
            self._order.setdefault(key, len(self._order))
        return dict(sorted(shapes.items(), key=lambda entry: self._order[entry[0]]))
