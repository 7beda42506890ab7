"""The methods by name. They are imported when they are asked for."""

import functools
from importlib import import_module

from streammap.common.kinds import shown
from streammap.errors import PlanError
from streammap.planning.merging.methods.base import Method

_HERE = "streammap.planning.merging.methods."
_METHODS = {
    "linear": "linear:Linear",
    "passthrough": "passthrough:Passthrough",
    "task_arithmetic": "task_arithmetic:TaskArithmetic",
    "slerp": "on_sphere:SlerpMethod",
    "nuslerp": "on_sphere:NuSlerpMethod",
    "multislerp": "on_sphere:MultiSlerpMethod",
    "karcher": "on_sphere:KarcherMethod",
    "model_stock": "on_sphere:ModelStockMethod",
    "ties": "trimmed:Ties",
    "dare_linear": "trimmed:DareLinear",
    "dare_ties": "trimmed:DareTies",
    "breadcrumbs": "trimmed:Breadcrumbs",
    "breadcrumbs_ties": "trimmed:BreadcrumbsTies",
    "della": "trimmed:Della",
    "della_linear": "trimmed:DellaLinear",
}
"""Name -> where it is."""


def names() -> tuple[str, ...]:
    """All methods."""
    return tuple(_METHODS)


@functools.cache
def load(name: str) -> Method:
    """A method.

    Raises:
        PlanError: none has this name.
    """
    if name not in _METHODS:
        raise PlanError(f"no method {shown(name)}", hint=f"there are {', '.join(_METHODS)}")
    module, _, cls = _METHODS[name].partition(":")
    found: Method = getattr(import_module(_HERE + module), cls)()
    return found
