"""Which tensors of a checkpoint make each parameter of a module, under the module's own names.

A plain module has the names of its checkpoint. Models of transformers may have other names in
memory than on disk: prefixes, gamma and beta, experts one by one. The library's own renamings are
used, and its conversions are run on symbolic tensors (symbolic.py).
"""

import copy
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from streammap.architectures.classes.names import ClassNames, Pretrained, Transform
from streammap.errors import PlanError
from streammap.io.dtypes import TensorSpec
from streammap.output.module import symbolic
from streammap.output.module.symbolic import Assembly, UnmovedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Match:
    """How the tensors of a checkpoint match those of a module."""

    assemblies: Mapping[str, Assembly]
    """Name in the module -> the tensors of the checkpoint that make it."""
    unexpected: tuple[str, ...]
    """Keys that nothing in the module takes."""


def match(
    model: "torch.nn.Module",
    specs: Mapping[str, TensorSpec],
    expected: Mapping[str, "torch.Tensor"],
) -> Match:
    """Find the tensors of a checkpoint that make each parameter and buffer of a module.

    Args:
        specs: Key of the checkpoint -> dtype and shape.
        expected: Name in the module -> what is there.

    Raises:
        PlanError: a conversion that does more than move numbers.
    """
    pretrained = pretrained_of(model)
    if pretrained is not None:
        return _converted(pretrained, specs, expected)
    assemblies = {
        key: symbolic.whole(key, spec.shape) for key, spec in specs.items() if key in expected
    }
    return Match(assemblies, tuple(key for key in specs if key not in expected))


def pretrained_of(model: "torch.nn.Module") -> Pretrained | None:
    """The model, if it is one of transformers."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    return cast("Pretrained", model)


def ignored(
    model: Pretrained, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Missing and unexpected names, without those that the model's class ignores."""
    extra = [
        pattern
        for ending, pattern in (
            ("rotary_emb.inv_freq", r"rotary_emb\.inv_freq"),
            ("position_ids", r"(^|\.)position_ids$"),
        )
        if any(name.endswith(ending) for name, _ in model.named_buffers())
    ]
    without = model._keys_to_ignore_on_load_missing or ()
    beside = (*(model._keys_to_ignore_on_load_unexpected or ()), *extra)
    return _left(missing, without), _left(unexpected, beside)


def _left(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return tuple(name for name in names if not any(p.search(name) for p in compiled))


def _converted(
    model: Pretrained,
    specs: Mapping[str, TensorSpec],
    expected: Mapping[str, "torch.Tensor"],
) -> Match:
    names = ClassNames(model, expected)
    waiting: dict[str, tuple[Transform, list[str]]] = {}
    assemblies: dict[str, Assembly] = {}
    unexpected: list[str] = []
    for key in sorted(specs, key=names.order):
        name, pattern, converter = names.renamed(key)
        if name not in expected:
            unexpected.append(key)
        elif converter is None:
            assemblies.setdefault(name, symbolic.whole(key, specs[key].shape))
        else:
            made, sources = waiting.setdefault(name, (copy.deepcopy(converter), []))
            made.add_tensor(name, key, pattern, symbolic.whole(key, specs[key].shape))
            sources.append(key)
    for name, (converter, sources) in waiting.items():
        assemblies |= _moved(model, name, converter, sources)
    # As from_pretrained does, so that save_pretrained writes the names that were read.
    model._weight_conversions = [made for made in names.transforms if made.was_used()]
    return Match(assemblies, tuple(unexpected))


def _moved(
    model: Pretrained, name: str, converter: Transform, sources: list[str]
) -> dict[str, Assembly]:
    """What a conversion makes of its sources: one parameter or several."""
    try:
        made = converter.convert(name, model=model, config=model.config)
    except (UnmovedError, AttributeError, TypeError, ValueError) as error:
        raise PlanError(
            f"{name}: transformers makes it of {sources[0]} by more than moving numbers: {error}",
            hint="save the result and use from_pretrained",
        ) from error
    assemblies: dict[str, Assembly] = {}
    for key, value in made.items():
        one = value[0] if isinstance(value, list) else value
        if not isinstance(one, Assembly):
            raise PlanError(
                f"{name}: transformers makes {type(one).__name__} of {sources[0]}",
                hint="save the result and use from_pretrained",
            )
        assemblies[key] = one
    return assemblies
