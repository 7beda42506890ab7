"""Names for an optimizer's parameters, where its state has numbers: the model's class tells them.

torch numbers the parameters in the order in which an optimizer got them: all of a model in the
order of `named_parameters`, or, as transformers' Trainer gives them, those with weight decay first
and then the others. The class is made on the meta device, without numbers.
"""

import re
from collections.abc import Iterator, Mapping

from streammap.errors import CheckpointError
from streammap.io.optimizer import torch_file
from streammap.io.optimizer.state import OptimizerFile, key_of
from streammap.operators.optimizer import class_names
from streammap.planning.plan import Plan

_NAMED = "make the optimizer as AdamW(model.named_parameters()): its state then has names"
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names without weight decay, as transformers' Trainer has them; LayerNorms by their class too."""


def named(file: OptimizerFile, plan: Plan) -> OptimizerFile:
    """The state with the names of its parameters.

    Raises:
        CheckpointError: nothing tells their order, or none that is known fits their shapes.
    """
    if file.form.is_named or file.form.kind == "dcp":
        return file
    shapes = dict(_shapes(plan))
    numbers = [group.names for group in file.groups]
    what = next(iter(file.moments))
    specs = {name: file.checkpoint.spec(key_of(name, what)) for name in file.entries}
    problem = ""
    for order in _orders(shapes, len(numbers)):
        counts = [len(names) for names in order]
        if counts != [len(names) for names in numbers]:
            problem = problem or f"groups of {counts} parameters"
            continue
        pairs = {
            number: name
            for names, called in zip(numbers, order, strict=True)
            for number, name in zip(names, called, strict=True)
        }
        wrong = [n for n, name in pairs.items() if specs[n].shape != shapes[name][0]]
        if not wrong:
            return torch_file.renamed(file, pairs)
        first = wrong[0]
        problem = (
            f"{pairs[first]} of shape {list(shapes[pairs[first]][0])} as number {first}, which has "
            f"{list(specs[first].shape)}"
        )
    raise CheckpointError(
        f"{file.checkpoint.label}: {[len(names) for names in numbers]} parameters without names, "
        f"and the model's class has {problem or 'another number of groups'}",
        hint=f"is it the state of this model's optimizer? Otherwise {_NAMED}",
    )


def _orders(
    shapes: Mapping[str, tuple[tuple[int, ...], bool]], n_groups: int
) -> Iterator[list[list[str]]]:
    """Orders that are usual for so many groups."""
    names = list(shapes)
    if n_groups == 1:
        yield [names]
    if n_groups == 2:
        plain = re.compile("|".join(_NO_DECAY))
        decays = [n for n in names if not shapes[n][1] and plain.search(n.lower()) is None]
        yield [decays, [name for name in names if name not in set(decays)]]


def _shapes(plan: Plan) -> Iterator[tuple[str, tuple[tuple[int, ...], bool]]]:
    """Parameter -> its shape, and whether a LayerNorm has it, in the order of the class."""
    because = "the optimizer's state has numbers for its parameters"
    model = class_names.model_of(plan, because, _NAMED)
    import torch

    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        yield name, (tuple(parameter.shape), name in norms)
