"""All operators by name. They are imported when they are asked for."""

import functools
from collections.abc import Mapping
from importlib import import_module

from streammap.common.kinds import shown
from streammap.errors import PlanError
from streammap.operators.declare import Operator

_HERE = "streammap.operators."
_OPERATORS: dict[str, tuple[str, str]] = {
    "coalesce": ("resize:Coalesce", "Shrink or prune: units of a group become their mean."),
    "decoalesce": ("resize:Decoalesce", "Expand: copy units; widening is function-preserving."),
    "restack": ("depth.restack:Restack", "Change the depth: drop, repeat or insert layers."),
    "remap": ("learned.remap:Remap", "Apply learned maps: matrices of axes, weights of layers."),
    "blend": ("blend:Blend", "Make any number of checkpoints one: means, sums, stacks."),
    "interpolate": ("interpolate:Interpolate", "Blend two checkpoints of one model."),
    "align": (
        "ordering.align:Align",
        "Put units in another model's order; the function stays.",
    ),
    "merge-lora": ("merge_lora:MergeLora", "Merge LoRA adapters into their model."),
    "convert": ("convert:Convert", "Change dtype, files, experts' layout, head or vocabulary."),
    "permute": ("ordering.permute:Permute", "Put units in a random order; the function stays."),
    "keep-quantised": ("keep_quantised:KeepQuantised", "Copy codes and scales as they are."),
    "carry-optimizer": ("optimizer.carry:CarryOptimizer", ""),
    "configure": ("configure:Configure", ""),
}
"""Name -> where it is, and its line in the list of commands ("": it is no command)."""
_OWN: dict[str, type[Operator]] = {}
"""Operators of other packages."""


def register(operator: type[Operator]) -> None:
    """Add an operator of your own: it becomes a command, a call, and an entry of records.

    Raises:
        ValueError: another operator has its name.
    """
    if operator.name in names() and _OWN.get(operator.name) is not operator:
        raise ValueError(f"an operator {operator.name!r} is known already")
    _OWN[operator.name] = operator


def unregister(operator: type[Operator]) -> None:
    """Forget an operator that `register` added."""
    _OWN.pop(operator.name, None)


def names() -> tuple[str, ...]:
    """All operators."""
    return (*_OPERATORS, *_OWN)


def commands() -> Mapping[str, str]:
    """Operators that are commands, with a line on each; none of them is imported for it."""
    own = {name: (cls.__doc__ or "").partition("\n")[0] for name, cls in _OWN.items()}
    return {name: line for name, (_, line) in _OPERATORS.items() if line} | own


def load(name: str) -> type[Operator]:
    """The operator's class.

    Raises:
        PlanError: no operator has this name.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in _OPERATORS:
        raise PlanError(f"no operator {shown(name)}", hint=f"known: {', '.join(names())}")
    return _imported(_OPERATORS[name][0])


@functools.cache
def _imported(home: str) -> type[Operator]:
    module, _, cls = home.partition(":")
    found: type[Operator] = getattr(import_module(_HERE + module), cls)
    return found
