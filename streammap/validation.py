"""A result's config.json against the validators of its own class, where transformers is there."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from streammap import optional
from streammap.errors import PlanError

_LARGE_NBYTES = 10**9


def check(
    source: Mapping[str, object] | None, result: Mapping[str, object] | None, *, nbytes: int
) -> None:
    """Refuse a config.json that transformers would refuse, if it takes the source's.

    transformers is slow to import: where it isn't imported yet, only a large result is worth it.

    Args:
        nbytes: Size of the result.

    Raises:
        PlanError: with transformers' own reason.
    """
    if source is None or result is None or source == result:
        return
    if "transformers" not in sys.modules and nbytes < _LARGE_NBYTES:
        return
    made = _config_class(str(result.get("model_type")))
    if made is None or _refusal(made, source) is not None:
        return
    why = _refusal(made, result)
    if why is not None:
        raise PlanError(
            f"config.json: transformers would refuse the result: {why}",
            hint="ask for sizes that it takes",
        )


def _config_class(model_type: str) -> Callable[[dict[str, object]], object] | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        auto: ModuleType = importlib.import_module("transformers.models.auto.configuration_auto")
        found = auto.CONFIG_MAPPING[model_type]
    except (ImportError, KeyError, AttributeError):
        return None
    made: Callable[[dict[str, object]], object] = found.from_dict
    return made


def _refusal(
    made: Callable[[dict[str, object]], object], config: Mapping[str, object]
) -> str | None:
    """Why a class doesn't take a config, in one line."""
    try:
        with optional.quiet():
            made(dict(config))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return None
