"""A plan: a checkpoint that has not been written.

It holds, for each key of the result, the LinearForm that computes it, and beside that config.json,
the side files, what was done (`steps`) and what that guarantees. It is data: the engine reads its
tensors. Operators take plans and give plans, and a chain of them is one plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from streammap.errors import CheckpointError, PlanError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.map_file import MapLevel
from streammap.planning.optimizer.state import OptimizerState
from streammap.planning.request import OperatorCall

if TYPE_CHECKING:
    from streammap.architectures.model import Model

FORMAT = 1
"""Version of what a digest and a provenance file mean."""
Promise = Literal["bit-exact", "exact", "exact up to eps", "approximate"]
PROMISES: tuple[Promise, ...] = ("bit-exact", "exact", "exact up to eps", "approximate")
"""From the strongest to the weakest; exactness.py says what they mean."""
STAY_ZERO = "training leaves them so until a blend (--blend-with)"
"""Of units that nothing maps to, and that nothing reads: the gradient of each is zero too."""


_TWINS = (
    "copies ({}) have equal gradients: they stay equal in training until noise (--noise 10), "
    "unequal shares (--split), a blend (--blend-with) or dropout tell them apart"
)


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a chain, for people and for the provenance file."""

    operator: str
    options: Mapping[str, object]
    promise: Promise
    reason: str
    """Why the promise is what it is, in one line."""
    notes: tuple[str, ...] = ()
    """What a user might not expect: heads in no group, entries that are not used."""
    axes: Mapping[str, tuple[Promise, str]] = field(default_factory=dict)
    """Axis -> what its change promises, and why."""
    twins: tuple[str, ...] = ()
    """Units whose copies have equal gradients, so that only a later step tells them apart."""
    parts_twins: bool = False
    """Whether it tells copies apart that steps before made."""


class Search(ABC):
    """What is found by reading tensors, before a run begins."""

    @property
    @abstractmethod
    def pass_nbytes(self) -> int:
        """Bytes that one pass reads."""

    @property
    @abstractmethod
    def peak_nbytes(self) -> int:
        """Memory that the search takes, on top of what any run takes, at most."""

    @property
    @abstractmethod
    def largest(self) -> str:
        """What takes most of it, in words."""

    @abstractmethod
    def told(self) -> tuple[str, ...]:
        """What it does and takes, for plans."""


Find = Callable[[Search], MapLevel]
"""Makes a search."""


class Pending(ABC):
    """What has to be found by reading before a plan can be run: it was made with stand-ins.

    A plan that is made of such a one is pending too. `engine/searching` finds it.
    """

    searches: tuple[Search, ...] = ()
    """Those that are known before any is done."""
    known: "Plan | None" = None
    """The plan with what was found, once it was."""

    @abstractmethod
    def settled(self, find: Find) -> "Plan":
        """The plan with what is found."""


@final
@dataclass(frozen=True, slots=True)
class Moment:
    """What the tensors of a plan are, if not weights: means that an optimizer keeps of gradients.

    Such a plan has the keys, shapes and config of weights, and goes through the same operators, see
    optimizer/dual.py.
    """

    power: Literal[0, 1, 2]
    """1: of gradients; 2: of their squares; 0: the weights, under an optimizer's names."""
    resets: bool = False
    """Whether new units and layers begin at 0, instead of as copies."""

    def factor(self, of_weight: float) -> float:
        """What goes with a factor on a weight that the forward pass undoes."""
        return of_weight**-self.power if of_weight else 0.0

    @property
    def of_gradients(self) -> "Moment | None":
        """The moment itself; None where it stands for weights."""
        return self if self.power else None


@final
class Resolved:
    """Models of a plan and of those made from it: each is resolved once, whatever was copied."""

    def __init__(self) -> None:
        self._kept: list[tuple[object, object, str | None, Model]] = []

    def __reduce__(self) -> tuple[type["Resolved"], tuple[()]]:
        return Resolved, ()

    def of(self, plan: "Plan") -> "Model":
        """The model of a plan."""
        for targets, config, architecture, model in self._kept:
            # By identity: plans are copied with other records, and rarely with other tensors.
            is_same = targets is plan.targets and config is plan.config
            if is_same and architecture == plan.architecture:
                return model
        from streammap.architectures import resolving

        specs = {key: form.spec for key, form in plan.weights.items()}
        model = resolving.resolve(specs, plan.config, name=plan.architecture)
        self._kept = [(plan.targets, plan.config, plan.architecture, model), *self._kept[:3]]
        return model


@final
@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Plan:
    """A result, tensor by tensor, not written."""

    targets: Mapping[str, LinearForm]
    """In the order of the source's files."""
    config: Mapping[str, object] | None
    sources: tuple[Checkpoint, ...]
    steps: tuple[Step, ...] = ()
    levels: tuple[MapLevel, ...] = ()
    """The maps used on the way down, largest model first."""
    side: Checkpoint | None = None
    """The source whose tokenizer and other files go along."""
    sized: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Axis -> its size in the side files' model and in the result, where they differ."""
    architecture: str | None = None
    """The spec to read it by, where config.json doesn't tell."""
    named: tuple[Path, ...] = ()
    """Files of this machine that were read beside the sources: schemes, maps, configs, specs; or
    the folders that they are in."""
    strict: bool = False
    """Whether a run ends in an error where rounding makes numbers infinite, or 0."""
    moment: Moment | None = None
    """What its tensors are, if they are not weights."""
    optimizer: OptimizerState | None = None
    """The optimizer's state that is among the tensors; None where there is none."""
    request: OperatorCall | None = None
    """What was asked; None where it was made by other means than operators/calls.py."""
    pending: Pending | None = None
    """What has to be found before it can be run; None where nothing has to."""
    resolved: Resolved = field(default_factory=Resolved, repr=False)

    def __repr__(self) -> str:
        """In short: what is whole takes millions of letters."""
        names = ", ".join(source.name for source in self.sources)
        return f"<Plan of {len(self.targets)} tensors of {names}, {len(self.steps)} steps>"

    def form(self, key: str) -> LinearForm:
        """How a tensor is computed.

        Raises:
            PlanError: there is none of this name.
        """
        if key not in self.targets:
            import difflib  # most calls have no use for it

            near = difflib.get_close_matches(str(key), self.targets, n=1)
            told = near[0] if near else some(list(self.targets))
            hint = f"did you mean {told}?" if near else f"there are {told}"
            raise PlanError(f"no tensor {str(key)[:200]!r}", hint=hint)
        return self.targets[key]

    @property
    def weights(self) -> Mapping[str, LinearForm]:
        """The tensors without an optimizer's state."""
        if self.optimizer is None:
            return self.targets
        state = self.optimizer.entries
        return {key: form for key, form in self.targets.items() if key not in state}

    @property
    def without_optimizer(self) -> "Plan":
        """The plan of the weights alone."""
        if self.optimizer is None:
            return self
        read = {id(ref.source) for form in self.weights.values() for ref in form.loads()}
        sources = tuple(s for s in self.sources if id(s) in read or s.config is not None)
        return replace(self, targets=self.weights, sources=sources, optimizer=None)

    @property
    def nest(self) -> str | None:
        """What the source's state dict is nested under."""
        return None if self.side is None else self.side.nest

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Key -> dtype and shape."""
        return {key: form.spec for key, form in self.targets.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(form.spec.nbytes for form in self.targets.values())

    @property
    def promise(self) -> tuple[Promise, str]:
        """What the whole chain promises, and the reason."""
        if not self.steps:
            return "bit-exact", "nothing is changed"
        weakest = max(self.steps, key=lambda step: PROMISES.index(step.promise))
        alike = [step for step in self.steps if step.promise == weakest.promise]
        named = alike[:1] if weakest.promise == "approximate" else alike
        return weakest.promise, "; ".join(f"{step.operator}: {step.reason}" for step in named)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user might not expect; side_files.notes adds what concerns side files."""
        odd = [f"{source.name}: {note}" for source in self.sources for note in source.notes]
        left = [
            f"{source.name}: {some(source.others, limit=5)} beside the state dict: left out"
            for source in self.sources
            if source.others and self.optimizer is None
        ]
        wrapped = [
            f"{source.name}: {' and '.join(source.wrappers)} is left out of its keys"
            for source in self.sources
            if source.wrappers
        ]
        told = [note for step in self.steps for note in step.notes]
        parted = max((i for i, step in enumerate(self.steps) if step.parts_twins), default=0)
        twins = dict.fromkeys(units for step in self.steps[parted:] for units in step.twins)
        told += [_TWINS.format(", ".join(twins))] if twins else []
        if self.pending is not None:
            told += [note for search in self.pending.searches for note in search.told()]
        return tuple(dict.fromkeys((*odd, *left, *wrapped, *told)))

    @property
    def model(self) -> "Model":
        """The plan as its architecture spec sees it; resolved once, also for copies of the plan.

        Raises:
            ArchitectureError, CheckpointError: no spec serves it, or it does not fit.
        """
        try:
            return self.resolved.of(self)
        except CheckpointError as error:
            for source in self.sources:
                for note in source.notes:  # a tensor that a shard lacks, say, may be the cause
                    error.add_note(f"{source.name}: {note}")
            raise

    def check_settled(self) -> None:
        """Refuse to be run with stand-ins.

        Raises:
            PlanError: something has to be found first.
        """
        if self.pending is not None:
            raise PlanError(
                "this plan needs a search first, which was not made",
                hint="streammap.engine.searching.settle.settled(plan, options) makes it",
            )

    def with_request(self, request: OperatorCall | None) -> "Plan":
        """The same plan with its record."""
        return replace(self, request=request)


def from_checkpoint(
    checkpoint: Checkpoint,
    levels: tuple[MapLevel, ...],
    *,
    architecture: str | None = None,
    as_stored: bool = False,
) -> Plan:
    """The plan that changes nothing.

    Args:
        as_stored: Whether quantised tensors stay codes and scales; otherwise they are decoded where
            their format is read. What quantisation left beside plain weights is left out.

    Raises:
        CheckpointError: codes without their scales, or of shapes that don't fit.
    """
    from streammap.architectures import quantization

    plain = as_it_is(quantization.as_plain(checkpoint, decodes=not as_stored))
    return replace(plain, levels=levels, architecture=architecture)


def as_it_is(checkpoint: Checkpoint) -> Plan:
    """All tensors of a checkpoint, whatever they are."""
    targets = {key: graph.load(checkpoint, key) for key in checkpoint.slots}
    return Plan(targets, checkpoint.config, (checkpoint,), side=checkpoint)
