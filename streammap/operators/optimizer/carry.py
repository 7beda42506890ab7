"""CarryOptimizer: an optimizer's state goes through the operators that made a plan."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, final

from streammap.errors import CheckpointError, PlanError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.optimizer import find
from streammap.io.optimizer.state import PREFIX, STEP, OptimizerFile, key_of
from streammap.operators.declare import Operator, declared, option
from streammap.operators.optimizer import class_names, parameter_order
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.optimizer import moments, parameters, steps
from streammap.planning.optimizer.state import OptimizerState
from streammap.planning.plan import Moment, Plan, Step
from streammap.planning.request import OperatorCall

NewState = Literal["copy", "zero"]
_HINT = "leave --optimizer out: the optimizer starts fresh"


@final
@declared
class CarryOptimizer(Operator):
    """Take the optimizer's state along: Adam's moments go with the weights.

    It stands last: what was asked for is planned once more for each mean that the optimizer keeps.
    """

    examples = ("decoalesce run/checkpoint-500/ wide/ --width 2 --optimizer",)

    new_state: NewState = option(
        default="copy",
        help="zero: moments of new units and layers begin at 0, instead of as copies.",
    )

    def plan(self, source: Plan) -> Plan:
        """The plan with the state of its parameters among the tensors.

        Raises:
            CheckpointError: no state, or one that is broken or of another model.
            PlanError: operators that say nothing of gradients.
        """
        if source.optimizer is not None:
            raise PlanError("--optimizer: its state is there already", hint="give it once")
        if source.request is None:
            raise PlanError(
                "--optimizer: this plan does not say how it was made",
                hint="make it by streammap's operators from opened checkpoints",
            )
        states = _States(resets=self.new_state == "zero")
        means = states.of(source.sources[0]).moments
        made = {
            what: states.through(source.request, what, Moment(power, states.resets)).targets
            for what, power in means.items()
        }
        first = next(iter(means))
        weights = states.through(source.request, first, Moment(0))
        carried = states.called(weights, moments.carried(weights, states.checkpoints))
        names = list(carried.values())
        targets: dict[str, LinearForm] = {}
        entries: dict[str, tuple[str, str]] = {}
        for stored, name in carried.items():
            kept = {what: forms[stored] for what, forms in made.items()}
            for what, form in (states.step(kept[first], first) | kept).items():
                if means.get(what) == 2:
                    moments.check_squares(f"{name}.{what}", form)
                key = key_of(name, what)
                targets[key], entries[key] = form, (name, what)
        begun = {name: states.begun(made[first][key], first) for key, name in carried.items()}
        frame = begun[names[0]][0]
        plain = states.through(source.request, first, Moment(1)).targets if states.resets else None
        gradients = plain or made[first]
        found = steps.factors(
            {name: (weights.targets[key], gradients[key]) for key, name in carried.items()}
        )
        untrained = states.untrained(weights, carried)
        rates = steps.notes(found, len(names), len(states.checkpoints))
        state = OptimizerState(
            entries,
            parameters.grouped(frame.groups, {name: old for name, (_, old) in begun.items()}),
            frame.form,
            found,
        )
        return replace(
            source,
            targets={**source.targets, **targets},
            sources=(*source.sources, *states.checkpoints),
            steps=(*source.steps, self._step(len(names), means, rates, untrained)),
            optimizer=state,
            request=None,
        )

    def _step(
        self,
        n: int,
        means: Iterable[str],
        rates: Iterable[str],
        untrained: Sequence[str],
    ) -> Step:
        told = [f"the optimizer's state goes along: {', '.join(means)} of {n} parameters"]
        if untrained:
            told.append(f"{some(untrained)}: no state in the source, and none in the result")
        if self.new_state == "zero":
            told.append("moments of new units begin at 0: warm the learning rate up again")
        return Step(
            self.name,
            {"new_state": self.new_state},
            "bit-exact",
            "the optimizer's state goes with the weights",
            (*told, *rates),
            parts_twins=self.new_state == "zero",
        )


@final
class _States:
    """The states of the sources, each opened once."""

    def __init__(self, *, resets: bool) -> None:
        self.resets = resets
        self._found: dict[str, OptimizerFile] = {}
        self._named: dict[str, OptimizerFile] = {}
        self._keys: dict[str, Mapping[str, str]] = {}

    def of(self, source: Checkpoint) -> OptimizerFile:
        """The state that belongs to an opened checkpoint."""
        if source.address not in self._found:
            self._found[source.address] = find.of(source)
        return self._found[source.address]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Their tensors, as sources."""
        return tuple(file.checkpoint for file in self._named.values())

    def through(self, call: OperatorCall, what: str, moment: Moment) -> Plan:
        """The plan of one mean, made by the operators that made the weights."""
        from streammap.operators import calls

        def opened(plan: Plan) -> Plan:
            file = self._of_plan(plan)
            keys = self._keys_of(plan, file, what)
            return moments.of(plan, file, keys, what, moment)

        return calls.build(call, view=opened)

    def called(self, plan: Plan, keys: Sequence[str]) -> dict[str, str]:
        """Key of a result -> the name of its parameter, as the sources' states have them."""
        if any(self._keys.values()):
            return class_names.of(plan, keys)
        return {key: key for key in keys}

    def begun(self, form: LinearForm, what: str) -> tuple[OptimizerFile, str]:
        """Whose state a mean of the result begins with: the first that it is computed from."""
        by_id = {id(file.checkpoint): file for file in self._named.values()}
        for ref in form.loads():
            if id(ref.source) in by_id:
                name = ref.key.removeprefix(PREFIX).removesuffix(f".{what}")
                return by_id[id(ref.source)], name
        raise PlanError("--optimizer: a mean of no state", hint=_HINT)

    def untrained(self, plan: Plan, names: Container[str]) -> list[str]:
        """Parameters of the result that have no state: of one layer each, buffers left out."""
        heads = plan.model.tied_heads
        return [
            key
            for family in plan.model.families
            if family.rule.kind != "buffer"
            for key in list(family.members.values())[:1]
            if key not in names and not any(head.is_head(key) for head in heads)
        ]

    def step(self, form: LinearForm, what: str) -> dict[str, LinearForm]:
        """The number of steps that a parameter has made; 0 where its means begin at 0."""
        file, name = self.begun(form, what)
        if STEP not in file.entries[name]:
            return {}
        number = file.entries[name][STEP]
        key = key_of(name, STEP)
        made = graph.constant(number) if number is not None else graph.load(file.checkpoint, key)
        is_zero = all(c == 0.0 for term in form.terms for c, _ in term.blend)
        return {STEP: graph.scale(made, 0.0 if is_zero else 1.0)}

    def _keys_of(self, plan: Plan, file: OptimizerFile, what: str) -> Mapping[str, str]:
        """Name in a state -> key of the plan that it is opened for, where its class renames it."""
        address = plan.sources[0].address
        if address not in self._keys:
            self._keys[address] = {}
            try:
                moments.of(plan, file, {}, what, Moment(0))
            except CheckpointError:
                self._keys[address] = class_names.keys(plan, file.entries)
        return self._keys[address]

    def _of_plan(self, plan: Plan) -> OptimizerFile:
        source = plan.sources[0]
        if source.address not in self._named:
            file = self.of(source)
            self._named[source.address] = parameter_order.named(file, plan)
        file = self._named[source.address]
        first = next(iter(self._named.values()))
        if file.moments != first.moments or len(file.groups) != len(first.groups):
            raise PlanError(
                f"--optimizer: {source.name} keeps {', '.join(file.moments)} in "
                f"{len(file.groups)} groups, {first.checkpoint.name} keeps "
                f"{', '.join(first.moments)} in {len(first.groups)}",
                hint=_HINT,
            )
        return file
