"""An operator as a contributor writes it: one module, registered by its test."""

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import ClassVar

from streammap.errors import PlanError
from streammap.operators.declare import Operator, declared, option
from streammap.planning import graph
from streammap.planning.plan import Plan, Step


@declared
class Scale(Operator):
    """Multiply some tensors by a number."""

    examples: ClassVar[tuple[str, ...]] = ("scale llama/ scaled/ --key '*.bias' --by 0.5",)

    key: str = option(help="Keys to scale, with * for any text.", metavar="GLOB")
    by: float = option(help="The factor.")

    def plan(self, source: Plan) -> Plan:
        """The plan with these tensors scaled.

        Raises:
            PlanError: no key matches.
        """
        targets = {
            key: graph.combine([(self.by, form)], dtype=form.spec.dtype)
            if fnmatchcase(key, self.key)
            else form
            for key, form in source.targets.items()
        }
        if all(targets[key] is form for key, form in source.targets.items()):
            raise PlanError(f"no key matches {self.key!r}", hint="`streammap inspect` lists them")
        step = Step(self.name, {"key": self.key, "by": self.by}, "approximate", "scaled")
        return replace(source, targets=targets, steps=(*source.steps, step), request=None)
