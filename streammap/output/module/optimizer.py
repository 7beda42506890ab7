"""Fill an optimizer in place with a plan's state: each process computes what it holds.

A mean of gradients lies as its parameter does, sharded or whole, so that a module of means is
filled as a model is (load.py).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streammap.common.events import Listener
from streammap.engine import evaluate
from streammap.errors import PlanError, some
from streammap.io import key_wrappers
from streammap.io.optimizer.state import STEP, Group, key_of
from streammap.output.module import load, parameters
from streammap.output.module.load import LoadOptions, LoadReport
from streammap.planning.optimizer.state import OptimizerState
from streammap.planning.plan import Plan


def fill(
    plan: Plan, module: nn.Module, optimizer: Optimizer, options: LoadOptions, listener: Listener
) -> LoadReport:
    """Give each parameter of an optimizer its state, and each group its options.

    Options are set where all parameters of a group are of one group of the state: an optimizer
    with further groups keeps its own.

    Raises:
        PlanError: a plan without state; parameters that are not the state's, or of other shapes.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read. The optimizer is as it was.
    """
    state = plan.optimizer
    if state is None:
        raise PlanError(
            "there is no optimizer's state in this plan",
            hint="take it along: streammap.open(...).decoalesce(...).carry_optimizer()",
        )
    held = _held(parameters.unwrapped(module), optimizer)
    _check(plan, state, held)
    whats = dict.fromkeys(what for _, what in state.entries.values() if what != STEP)
    made: dict[str, dict[str, Tensor]] = {}
    reports = []
    for what in whats:
        shadow = _module({name: torch.zeros_like(p.detach()) for name, p in held.items()})
        targets = {name: plan.targets[key_of(name, what)] for name in held}
        means = replace(plan, targets=targets, optimizer=None)
        reports.append(load.load(means, shadow, options, listener))
        made[what] = {name: p.detach() for name, p in shadow.named_parameters()}
    steps = {
        name: float(evaluate.read_tensor(plan, key_of(name, STEP)))
        for name, what in state.entries.values()
        if what == STEP
    }
    for name, parameter in held.items():
        kept = optimizer.state[parameter]
        kept.clear()
        if name in steps:
            kept[STEP] = _step(optimizer, parameter, steps[name])
        kept.update({what: tensors[name] for what, tensors in made.items()})
    _set_options(optimizer, state.groups, {id(p): name for name, p in held.items()})
    return replace(
        reports[0],
        n_tensors=sum(report.n_tensors for report in reports),
        nbytes=sum(report.nbytes for report in reports),
        nbytes_read=sum(report.nbytes_read for report in reports),
        seconds=sum(report.seconds for report in reports),
        peak_nbytes=max(report.peak_nbytes for report in reports),
        planned_nbytes=max(report.planned_nbytes for report in reports),
    )


def _held(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter, of all that the optimizer has."""
    stored = dict(model.named_parameters())
    plain = key_wrappers.unwrap(stored.keys())
    names = {id(p): plain.key(name) for name, p in stored.items()}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in names for p in own):
        n = sum(id(p) not in names for p in own)
        raise PlanError(
            f"{n} of {len(own)} parameters of the optimizer are not the model's",
            hint="make the optimizer from this model, after it was sharded",
        )
    return {names[id(p)]: p for p in own}


def _check(plan: Plan, state: OptimizerState, held: Mapping[str, nn.Parameter]) -> None:
    """Refuse what does not fit, before anything is changed."""
    known = set(state.names)
    missing, unexpected = [n for n in held if n not in known], [n for n in known if n not in held]
    if missing or unexpected:
        told = [f"{some(missing)} have no state"] if missing else []
        told += [f"the state's {some(sorted(unexpected))} are not there"] if unexpected else []
        raise PlanError(
            f"the optimizer's parameters are not the state's: {'; '.join(told)}",
            hint="is it an optimizer of all parameters, and the model of the result's config?",
        )
    for name, parameter in held.items():
        what = next(what for one, what in state.entries.values() if one == name and what != STEP)
        shape = plan.targets[key_of(name, what)].spec.shape
        if tuple(parameter.shape) != shape:
            raise PlanError(
                f"{name}: its state has {list(shape)}, the model {list(parameter.shape)}",
                hint="make the model from the result's config: Config.from_dict(lazy.config)",
            )
        if parameter.is_meta:
            raise PlanError(f"{name} is on the meta device", hint="fill the model first: load_into")


def _module(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with parameters of these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            inner = owner._modules[part]
            assert inner is not None
            owner = inner
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def _step(optimizer: Optimizer, parameter: nn.Parameter, value: float) -> Tensor:
    """The number of steps, as torch's optimizers keep it."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    on_device = group.get("capturable") or group.get("fused")
    is_wide = torch.get_default_dtype() is torch.float64
    dtype = torch.float64 if is_wide else torch.float32
    return torch.tensor(value, dtype=dtype, device=parameter.device if on_device else "cpu")


def _set_options(optimizer: Optimizer, groups: tuple[Group, ...], names: Mapping[int, str]) -> None:
    group_of = {name: group for group in groups for name in group.names}
    for own in optimizer.param_groups:
        theirs = {id(group_of[names[id(p)]]): group_of[names[id(p)]] for p in own["params"]}
        n = len(own["params"])
        if len(theirs) == 1:
            (group,) = theirs.values()
            if len(group.names) == n:
                own.update(group.options)
