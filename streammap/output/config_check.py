"""A result's config.json against the validators of its own class, where transformers is there.

    python -m streammap.output.config_check
        two configs on stdin as a JSON list -> the refusal, if any

That is how it is done where transformers isn't imported yet: it takes 100 MB, which a run has not.
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
"""What takes longer to write than the seconds that transformers takes to import."""
_MOST_SECONDS = 60.0


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
    if "transformers" in sys.modules:
        why = _compared(source, result)
    elif nbytes >= _LARGE_NBYTES and importlib.util.find_spec("transformers") is not None:
        why = _compared_apart(source, result)
    else:
        return
    if why is not None:
        raise PlanError(
            f"config.json: transformers would refuse the result: {why}",
            hint="ask for sizes that it takes",
        )


def _compared(source: Mapping[str, object], result: Mapping[str, object]) -> str | None:
    """Why transformers takes the source's config and not the result's; None where it does."""
    made = _config_class(str(result.get("model_type")))
    if made is None or _refusal(made, source) is not None:
        return None
    return _refusal(made, result)


def _compared_apart(source: Mapping[str, object], result: Mapping[str, object]) -> str | None:
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


if __name__ == "__main__":
    sys.stdout.write(_compared(*json.load(sys.stdin)) or "")
