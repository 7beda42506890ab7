"""Other dtypes for a plan's tensors: by pattern, rounded once, and told in config.json."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import final

from streammap.errors import PlanError, some
from streammap.io import dtypes
from streammap.io.dtypes import FLOATS, TORCH_NAMES
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan, Promise

_SHORT = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64"}
_SHORT |= {"f16": "F16", "f32": "F32", "f64": "F64"}
_NAMES = {TORCH_NAMES[name]: name for name in FLOATS} | _SHORT
_NAMES |= {"half": "F16", "float": "F32", "double": "F64"}
_PLAIN_F8 = ("F8_E4M3", "F8_E5M2")
_FIELDS = ("dtype", "torch_dtype")
_QUANTIZED = ("quantization_config", "compression_config")
_HINT = "give one of bfloat16, float16, float32, float64, or KEY=DTYPE,...,DTYPE"


@final
@dataclass(frozen=True, slots=True)
class DtypeRules:
    """What dtypes a result's tensors get: the first rule whose filter is in a key."""

    filters: tuple[tuple[str, str], ...]
    """Part of a key, or a pattern with * of all of it -> dtype."""
    others: str | None
    """The dtype of all others; None where they keep their own."""

    def __str__(self) -> str:
        rules = [f"{part}={TORCH_NAMES[name]}" for part, name in self.filters]
        return ",".join(rules + ([TORCH_NAMES[self.others]] if self.others else []))


def parse(value: object, where: str) -> DtypeRules:
    """Rules from text, from a dtype of torch, or from a table of filters.

    Raises:
        PlanError: a dtype that is not computed with; two for all others.
    """
    if isinstance(value, DtypeRules):
        return value
    if isinstance(value, Mapping):
        pairs = [("" if part == "*" else str(part), str(name)) for part, name in value.items()]
    else:
        texts = [part.strip() for part in str(value).split(",")]
        pairs = [(part, name) for part, _, name in (text.rpartition("=") for text in texts)]
    plain = [_dtype(name, where) for part, name in pairs if not part]
    if len(plain) > 1:
        raise PlanError(f"{where}: {some(plain)} for all other tensors, expected one", hint=_HINT)
    filters = tuple((part, _dtype(name, where)) for part, name in pairs if part)
    return DtypeRules(filters, plain[0] if plain else None)


def _dtype(name: str, where: str) -> str:
    word = name.strip().lower().removeprefix("torch.")
    if word in _NAMES:
        return _NAMES[word]
    hint = _HINT
    if re.match(r"float8|fp8|f8|int|uint", word):
        hint = f"weights in {word[:20]} need scales: a quantiser (llm-compressor) makes them"
    raise PlanError(f"{where}: {name[:40]!r} is no dtype that weights can be rounded to", hint=hint)


def cast(plan: Plan, rules: DtypeRules) -> tuple[Plan, tuple[Promise, str], tuple[str, ...]]:
    """The plan in other dtypes, what that promises, and notes.

    Integers and flags stay. Rounding is to the nearest, ties to even, from the exact value, once.

    Raises:
        PlanError: a filter that is in no key.
    """
    if plan.moment is not None:
        return plan, ("bit-exact", "an optimizer's state keeps its dtype"), ()
    unused = [part for part, _ in rules.filters if not any(_fits(part, k) for k in plan.targets)]
    if unused:
        raise PlanError(
            f"--dtype {unused[0]}=...: no key has {unused[0]!r} in it",
            hint="`streammap inspect` lists the keys; * stands for any text of a whole key",
        )
    plain = _plain_kinds(plan)
    targets: dict[str, LinearForm] = {}
    narrower: dict[str, int] = {}
    wider, left = 0, []
    for key, form in plan.targets.items():
        targets[key] = form
        wanted = _wanted(rules, key)
        if wanted in (None, form.spec.dtype):
            continue
        assert wanted is not None
        if form.spec.dtype not in plain:
            left += [form.spec.dtype] * form.spec.dtype.startswith("F")
            continue
        targets[key] = graph.cast(form, wanted)
        if dtypes.holds(wanted, form.spec.dtype):
            wider += 1
        else:
            narrower[wanted] = narrower.get(wanted, 0) + 1
    promise: tuple[Promise, str] = ("bit-exact", "no dtype changes")
    if narrower:
        told = " and ".join(f"{n} tensors to {TORCH_NAMES[name]}" for name, n in narrower.items())
        promise = ("approximate", f"rounded to the nearest: {told}")
    elif wider:
        promise = ("bit-exact", "the new dtypes have every number of the old ones")
    notes = (
        [f"{some(sorted(set(left)))} ({len(left)} tensors) stay: they have scales"] if left else []
    )
    made = replace(plan, targets=targets, config=_config(plan.config, targets))
    return made, promise, tuple(notes)


def _plain_kinds(plan: Plan) -> tuple[str, ...]:
    """Dtypes whose numbers stand for themselves: 8 bits only where nothing has scales."""
    is_quantized = any(name in (plan.config or {}) for name in _QUANTIZED)
    has_scales = any("scale" in key.rpartition(".")[2] for key in plan.targets)
    return FLOATS if is_quantized or has_scales else (*FLOATS, *_PLAIN_F8)


def _wanted(rules: DtypeRules, key: str) -> str | None:
    return next((name for part, name in rules.filters if _fits(part, key)), rules.others)


def _fits(part: str, key: str) -> bool:
    return fnmatchcase(key, part) if "*" in part else part in key


def _config(
    config: Mapping[str, object] | None, targets: Mapping[str, LinearForm]
) -> Mapping[str, object] | None:
    """config.json with the dtype that most numbers have, wherever it says one."""
    counts: dict[str, int] = {}
    for form in targets.values():
        if form.spec.is_float:
            counts[form.spec.dtype] = counts.get(form.spec.dtype, 0) + form.spec.n_elements
    if config is None or not counts:
        return config
    name = TORCH_NAMES[max(counts, key=lambda dtype: counts[dtype])]
    changed: dict[str, object] = copy.deepcopy(dict(config))
    _set(changed, name)
    return config if changed == config else changed


def _set(config: dict[str, object], name: str) -> None:
    for field, value in config.items():
        if field in _FIELDS and isinstance(value, str):
            config[field] = f"torch.{name}" if value.startswith("torch.") else name
        elif field.endswith("_config") and field not in _QUANTIZED and isinstance(value, dict):
            _set(value, name)
