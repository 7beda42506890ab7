"""A result's config.json against the validators of its own class, if transformers is installed.

    python -m streammap.output.config_check
        two configs on stdin as a JSON list -> the refusal, if any

A process of its own, where transformers isn't imported yet: its 100 MB are not in a run's budget.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from streammap.common import optional
from streammap.errors import PlanError

_LARGE_NBYTES = 10**10
"""Larger results take longer to write than transformers takes to import."""
_MOST_SECONDS = 60.0


def check(
    source: Mapping[str, object] | None, result: Mapping[str, object] | None, *, nbytes: int
) -> None:
    """Refuse a config.json that transformers would refuse, if it accepts the source's.

    transformers is slow to import: where it isn't imported yet, only a large result is worth that.

    Args:
        nbytes: Size of the result.

    Raises:
        PlanError: with transformers' own reason.
    """
    if source is None or result is None or source == result:
        return
    if "transformers" in sys.modules:
        why = _compare(source, result)
    elif nbytes >= _LARGE_NBYTES and importlib.util.find_spec("transformers") is not None:
        why = _compare_apart(source, result)
    else:
        return
    if why is not None:
        raise PlanError(
            f"config.json: transformers would refuse the result: {why}",
            hint="ask for sizes that it accepts",
        )


def _compare(source: Mapping[str, object], result: Mapping[str, object]) -> str | None:
    """Why transformers accepts the source's config but not the result's; None if it does."""
    build = _config_class(str(result.get("model_type")))
    if build is None or _refusal(build, source) is not None:
        return None
    return _refusal(build, result)


def _compare_apart(source: Mapping[str, object], result: Mapping[str, object]) -> str | None:
    """The same, in a process of its own; None where that fails."""
    import subprocess

    try:
        done = subprocess.run(
            [sys.executable, "-m", "streammap.output.config_check"],
            input=json.dumps([source, result]),
            capture_output=True,
            text=True,
            check=True,
            timeout=_MOST_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _config_class(model_type: str) -> Callable[[dict[str, object]], object] | None:
    try:
        auto: ModuleType = importlib.import_module("transformers.models.auto.configuration_auto")
        build: Callable[[dict[str, object]], object] = auto.CONFIG_MAPPING[model_type].from_dict
    except (ImportError, KeyError, AttributeError):
        return None
    return build


def _refusal(
    build: Callable[[dict[str, object]], object], config: Mapping[str, object]
) -> str | None:
    """Why a class doesn't accept a config, in one line."""
    try:
        with optional.quiet():
            build(dict(config))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return None


if __name__ == "__main__":
    sys.stdout.write(_compare(*json.load(sys.stdin)) or "")
