"""Configure: another config.json beside the same weights, as the original's front saves it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from streammap.common.kinds import Table
from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.io.dtypes import TensorSpec
from streammap.operators.declare import Operator, declared, option
from streammap.planning.matching import config_difference
from streammap.planning.plan import Plan, Promise, Step

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@final
@declared
class Configure(Operator):
    """Replace config.json; the weights stay."""

    config: Mapping[str, object] = option(help="The whole of config.json.", kind=Table())

    def plan(self, source: Plan) -> Plan:
        """The plan with this config.json.

        Raises:
            PlanError: it is a part of a config.json, or one of another model or of other sizes.
        """
        before = source.config or {}
        if "model_type" in before and "model_type" not in self.config:
            raise PlanError(
                f"configure: config has {some(sorted(self.config)) or 'no fields'} and no "
                f"model_type: it replaces the whole config.json ({len(before)} fields, model_type "
                f"{before['model_type']})",
                hint="give all of config.json, with these fields changed",
            )
        made = replace(source, config=dict(self.config), request=None)
        try:
            spec = source.model.architecture
        except (ArchitectureError, CheckpointError):
            spec = None
        if spec is not None:
            _check_sizes(made)
        changed = config_difference.differences(before, self.config, spec)
        notes = tuple(_dtype_note(self.config, source.specs))
        if not changed and not notes:
            return made
        told = [f"{one.name} {one.target} instead of {one.source}" for one in changed]
        promise: Promise = "approximate" if changed else "bit-exact"
        reason = f"config.json says {some(told)}" if told else "no field of the function changes"
        step = Step(self.name, {}, promise, reason, notes)
        return replace(made, steps=(*source.steps, step))


def _check_sizes(made: Plan) -> None:
    """Refuse a config.json that is not the weights' own."""
    try:
        made.model  # noqa: B018 (resolving it compares shapes)
    except (ArchitectureError, CheckpointError) as error:
        raise PlanError(
            f"configure: config does not fit the weights: {error.message}",
            hint="give the config.json of this model: only what is no size can change",
        ) from error


def _dtype_note(config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> list[str]:
    """What loaders do with tensors of another dtype than config.json has."""
    given = config.get("dtype", config.get("torch_dtype"))
    wanted = _DTYPES.get(str(given).removeprefix("torch."))
    found = sorted({spec.dtype for spec in specs.values() if spec.is_float})
    if wanted is None or not found or wanted in found:
        return []
    return [f"config.json says {given}, the tensors are {some(found)}: loaders cast them"]
