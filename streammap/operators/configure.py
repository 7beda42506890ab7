"""Configure: another config.json beside the same weights, as the original's front saves it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from streammap.common.declare import Table
from streammap.operators.declare import Operator, declared, option
from streammap.planning.plan import Plan


@final
@declared
class Configure(Operator):
    """Replace config.json; the weights stay."""

    config: Mapping[str, object] = option(help="The whole of config.json.", kind=Table())

    def plan(self, source: Plan) -> Plan:
        """The plan with this config.json."""
        return replace(source, config=dict(self.config), request=None)
