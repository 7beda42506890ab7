"""Parameters by the names that the model's class has for them, where its files have others.

transformers renames tensors as it loads them: what Swin's files call attention.self.query is
attention.q_proj in its module, and in the state of an optimizer of that module. The class is made
on the meta device, without numbers, and renames as it does when it loads.
"""

import importlib
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from streammap.architectures.classes.names import ClassNames, Pretrained
from streammap.common import optional
from streammap.errors import CheckpointError, some
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    from torch import nn

_OTHERS = "the names of the optimizer's state are not those of the files"
_HINT = "leave --optimizer out: the optimizer starts fresh"


def of(plan: Plan, keys: Iterable[str]) -> dict[str, str]:
    """Key -> the name of the parameter in the class of a plan's model.

    Keys that the class joins or splits as it loads them keep their names.

    Raises:
        CheckpointError: transformers is not there, or has no class of the model.
    """
    model = model_of(plan, _OTHERS, _HINT)
    with optional.quiet(hide_warnings=True):
        names = ClassNames(cast("Pretrained", model), model.state_dict())
        made = {key: names.renamed(key) for key in keys}
    return {key: key if joins else name for key, (name, _, joins) in made.items()}


def keys(plan: Plan, names: Collection[str]) -> dict[str, str]:
    """Name in a state -> the key of a plan that its class loads it from; none where it has none.

    A plan whose model has no class in transformers has no other names.
    """
    try:
        found = of(plan, plan.targets)
    except CheckpointError:
        return {}
    return {name: key for key, name in found.items() if name != key and name in names}


def model_of(plan: Plan, because: str, hint: str) -> "nn.Module":
    """The model of a plan's config.json on the meta device.

    Args:
        because: Why it is needed, for refusals.
        hint: What to do without it.

    Raises:
        CheckpointError: transformers is not there, or has no class of it.
    """
    refused = f"{plan.sources[0].label}: {because}, and "
    try:
        import torch

        library = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            f"{refused}transformers, whose class would tell them, is not installed",
            hint=f"pip install transformers; or {hint}",
        ) from error
    config: dict[str, Any] = dict(plan.config or {})
    classes = config.get("architectures")
    named: Sequence[object] = classes if isinstance(classes, list) else ()
    for name in named:
        cls = getattr(library, str(name), None)
        if isinstance(cls, type) and hasattr(cls, "config_class") and "auto_map" not in config:
            try:
                with optional.quiet(hide_warnings=True), torch.device("meta"):
                    made: nn.Module = cls(cls.config_class.from_dict(config))
            except (
                Exception
            ) as error:  # a class can raise anything of a config that it doesn't like
                raise CheckpointError(
                    f"{refused}{name} can't be made: {str(error)[:200]}", hint=hint
                ) from error
            return made
    raise CheckpointError(
        f"{refused}transformers has no class {some([str(name) for name in named]) or 'for it'}",
        hint=hint,
    )
