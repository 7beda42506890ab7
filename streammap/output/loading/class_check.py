"""A result that its own class would not load is refused before anything is written.

Where transformers (timm, for its models) is installed, the class that config.json names says which
tensors it has, of which shapes (class_trial.py), and the plan must agree. What the source has wrong
in the same way is no fault of the result.

Without the library, config.json is read back by the spec, and must give the planned shapes
(planner); and this project's specs are held against the classes in its tests.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sized
from pathlib import Path

from streammap.architectures import quantization, registry
from streammap.errors import PlanError, StreammapError, some
from streammap.io.dtypes import TensorSpec
from streammap.io.problems import Finding
from streammap.output.loading import class_trial
from streammap.output.loading.class_trial import Given, Library, Shape, Verdict
from streammap.output.save_options import ClassCheck
from streammap.planning.plan import Plan

_LARGE_NBYTES = 10**10
"""Larger results take longer to write than a library takes to import."""
_MANY_TENSORS = 5_000
"""A model of more is not built in this process: its modules would take some of a run's memory."""
_LARGEST = 10**7
"""A config.json with a larger number is nobody's: what a class makes of it is kept apart."""
_MOST_SECONDS = 120.0
_HINT = "ask for sizes that it accepts; --class-check never writes the result all the same"


def check(plan: Plan, when: ClassCheck) -> None:
    """Refuse a plan whose result its class would not load, though it loads the source.

    Args:
        when: "auto" asks where that costs little: the library is imported already; the result is
            large; or its spec is not one of this project's, so that nobody has proved it. "always"
            asks in any case.

    Raises:
        PlanError: with the tensor, the planned shape and the class's, or the class's own reason;
            with "always" also where there is no class to ask.
    """
    plan = plan.without_optimizer
    if when == "never" or plan.config is None:
        return
    if quantization.is_quantized(plan.specs, plan.config):
        if when == "always":
            raise PlanError(
                "config.json: no class to ask: its tensors are codes and scales",
                hint="--class-check auto goes on without it",
            )
        return
    source, result = source_of(plan), given(plan.config, plan.specs)
    library = class_trial.library_of(result[0])
    if when == "always":
        verdict = ask(source, result)
        if verdict is None:
            raise PlanError(
                f"config.json: no class to ask: {why_not(result[0])}",
                hint="--class-check auto goes on without it",
            )
    elif library is None or source == result or not _is_worth_it(plan, library):
        return
    else:
        verdict = ask(source, result)
    if verdict is not None and len(plan.sources) > 1:
        verdict = _without_surplus(verdict)
    if verdict is not None and not verdict.ok:
        raise PlanError(told(verdict, library or "its library"), hint=_HINT)


def _without_surplus(verdict: Verdict) -> Verdict:
    """A blend keeps what only one of its sources has: loaders leave out what they do not know."""
    wrong = {key: pair for key, pair in verdict.wrong.items() if pair[1] is not None}
    return Verdict(verdict.class_name, verdict.refusal, wrong)


def ask(source: Given | None, result: Given) -> Verdict | None:
    """What a result's class has against it, beside what it has against the source.

    Returns:
        None where it can't be asked; `why_not` says why.
    """
    library = class_trial.library_of(result[0])
    if library is None or not class_trial.is_installed(library):
        return None
    if _is_ready(library, *result):
        return class_trial.compare(source, result)
    return _ask_apart(source, result)


def findings(
    own: Plan, config: Mapping[str, object], expected: Plan | None
) -> list[Finding] | None:
    """What the class of a saved result has against it; None where it can't be asked.

    Args:
        own: The result as it is.
        config: Its config.json.
        expected: The plan that it was made by, whose source may have the same faults.
    """
    own, expected = own.without_optimizer, expected and expected.without_optimizer
    source = None if expected is None else source_of(expected)
    verdict = ask(source, given(config, own.specs))
    if verdict is None:
        return None
    if expected is not None and len(expected.sources) > 1:
        verdict = _without_surplus(verdict)
    if verdict.refusal:
        message = f"{verdict.class_name} can't be built: {verdict.refusal}"
        return [Finding("error", "class", message, file="config.json")]
    files = own.sources[0].file_of
    return [
        Finding(
            # A tensor more or less may be meant: the source that could tell may be out of reach.
            "note" if source is None and None in (found, made) else "error",
            "class",
            difference(found, made, verdict.class_name),
            key,
            files.get(key),
            found,
            made,
        )
        for key, (found, made) in verdict.wrong.items()
    ]


def why_not(config: Mapping[str, object]) -> str:
    """Why the class of a config.json can't be asked."""
    library = class_trial.library_of(config)
    if library is None:
        return "it brings its own code" if "auto_map" in config else "it names none"
    if not class_trial.is_installed(library):
        return f"{library} is not installed"
    name = config.get("model_type" if library == "transformers" else "architecture")
    return f"{library} has none for {name!r}, or does not load the source either"


def told(verdict: Verdict, library: str) -> str:
    """What a class has against a result, in one line: its first tensor, and how many there are."""
    if verdict.refusal:
        return f"config.json: {library} would refuse the result: {verdict.refusal}"
    key, (planned, made) = next(iter(verdict.wrong.items()))
    n, keys = len(verdict.wrong), some(list(verdict.wrong))
    more = f" ({n} such: {keys})" if n > 1 else ""
    return f"{key}: {difference(planned, made, verdict.class_name)}{more}"


def difference(found: Shape | None, made: Shape | None, class_name: str) -> str:
    """How a tensor differs from that of its class, both shapes named."""
    if made is None:
        return f"{class_name} of its config.json has no such tensor"
    if found is None:
        return f"not there, {class_name} of its config.json has it, with shape {list(made)}"
    return f"shape {list(found)}, {class_name} of its config.json has {list(made)}"


def source_of(plan: Plan) -> Given | None:
    """The source whose config.json the result's is made of."""
    side = plan.side
    if side is None or side.config is None:
        return None
    return given(side.config, {key: slot.spec for key, slot in side.slots.items()})


def given(config: Mapping[str, object], specs: Mapping[str, TensorSpec]) -> Given:
    """A config.json and tensors, as a class is asked about them."""
    return config, {key: spec.shape for key, spec in specs.items()}


def _is_ready(library: Library, config: Mapping[str, object], tensors: Sized) -> bool:
    """Whether a class can be asked in this process.

    transformers replaces functions of its own while it makes a model. Two threads that do so at
    once leave them replaced for good, and models made later are not tied any more.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    return library in sys.modules and len(tensors) <= _MANY_TENSORS and _largest(config) <= _LARGEST


def _largest(value: object) -> int:
    """The largest whole number in a config.json."""
    if isinstance(value, Mapping):
        return max(map(_largest, value.values()), default=0)
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return value if type(value) is int else 0


def _is_worth_it(plan: Plan, library: Library) -> bool:
    if plan.config is not None and _is_ready(library, plan.config, plan.targets):
        return True
    return plan.nbytes >= _LARGE_NBYTES or not _is_proved(plan)


def _is_proved(plan: Plan) -> bool:
    """Whether the plan was made by one of this project's own specs."""
    if plan.architecture is not None:
        return registry.is_shipped(plan.architecture)
    try:
        return registry.is_shipped(plan.model.architecture.name)
    except StreammapError:  # nothing reads it, so that nothing was resized
        return True


def _ask_apart(source: Given | None, result: Given) -> Verdict | None:
    """The same question to a process of its own; None where that fails."""
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            # Not from the current folder: that may be a checkpoint's, with any code in it.
            [sys.executable, "-P", "-m", "streammap.output.loading.class_trial"],
            input=json.dumps({"source": source, "result": result}),
            capture_output=True,
            text=True,
            check=True,
            timeout=_MOST_SECONDS,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return None if answer is None else Verdict.from_json(answer)
