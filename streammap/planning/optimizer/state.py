"""An optimizer's state among the tensors of a plan: which keys are of it, and its groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from streammap.io.optimizer.state import Form, Group, OptimizerFile, key_of
from streammap.planning.optimizer.steps import StepFactors


@final
@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The state of a plan's parameters."""

    entries: Mapping[str, tuple[str, str]]
    """Key among the plan's tensors -> the parameter's name, and what it is: exp_avg, step."""
    groups: tuple[Group, ...]
    """In the optimizer's order, as the parameters in them are."""
    form: Form
    factors: Mapping[str, StepFactors]
    """Parameter -> the factors of its options with which the source's steps go on, if any do."""

    @staticmethod
    def of_file(file: OptimizerFile) -> "OptimizerState":
        """A stored state, as it is."""
        entries = {
            key_of(name, what): (name, what) for name, kept in file.entries.items() for what in kept
        }
        return OptimizerState(entries, file.groups, file.form, {})

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, in the optimizer's order."""
        return tuple(name for group in self.groups for name in group.names)
