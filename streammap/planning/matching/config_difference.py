"""Fields of two config.json that say other functions of equal weights: rope_theta, hidden_act ...

What says nothing of the function is passed over: sizes (which are compared as axes), names of
classes and versions, what only training or generation reads. So is a field that one of them lacks:
loaders fill it in, and saving writes all of them. Only rotary positions have a known default.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from streammap.architectures.schema import Architecture

_SILENT = (
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "auto_map",
    "use_cache",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "pretrained_cfg",
    "gradient_checkpointing",
    "initializer_*",
    "*_init_std",
    "init_std",
    "*dropout*",
    "*_pdrop",
    "*drop_path*",
    "layerdrop",
    "*_layerdrop",
    "output_*",
    "return_dict*",
    "torchscript",
    "pretraining_tp",
    "generation_config",
    *(f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "cls", "unk", "decoder_start")),
    "forced_*_token_id",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_p",
    "num_beams",
    "_*",
)
"""Last or any part of a field's path, with * for any text."""
_THETA = 10000.0
"""Of rotary positions, where config.json has none."""


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field that is not the same in two config.json."""

    name: str
    """Its path: "text_config.hidden_act"."""
    source: object
    target: object
    """None where a config.json lacks it."""

    def told(self, source: str, target: str) -> str:
        """In words; `source` and `target` are what the two are called."""
        return f"{self.name} {_shown(self.source)} in {source}, {_shown(self.target)} in {target}"


def differences(
    source: Mapping[str, object], target: Mapping[str, object], spec: Architecture | None
) -> tuple[FieldDifference, ...]:
    """The fields that change what equal weights compute.

    Args:
        spec: What tells sizes from other fields; None where no spec serves the two.
    """
    sizes = _sizes(spec)
    ours, theirs = dict(_fields(source)), dict(_fields(target))
    found = []
    for name in dict.fromkeys((*theirs, *ours)):
        mine, other = ours.get(name), theirs.get(name)
        parts = name.split(".")
        is_rotary = parts[-1] == "rope_theta" or "rope_scaling" in parts
        if mine == other or ((mine is None or other is None) and not is_rotary):
            continue
        if parts[-1] == "rope_theta" and {mine, other} <= {None, _THETA}:
            continue
        if not is_silent(name) and not any(fnmatch.fnmatchcase(name, text) for text in sizes):
            found.append(FieldDifference(name, mine, other))
    return tuple(found)


def is_silent(name: str) -> bool:
    """Whether a field, by its path, says nothing of the function."""
    return any(fnmatch.fnmatchcase(part, text) for part in name.split(".") for text in _SILENT)


def _sizes(spec: Architecture | None) -> tuple[str, ...]:
    if spec is None:
        return ()
    return (*(field for axis in spec.axes.values() for field in axis.fields), *spec.config)


def _fields(table: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """Path -> value, of all that are set; rotary positions in one form."""
    for name, value in _rotary(table).items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{before}{name}.")
        elif value is not None:
            yield before + str(name), value


def _rotary(table: Mapping[str, object]) -> dict[str, object]:
    """The table with rotary positions as older files have them: rope_theta, and rope_scaling.

    Newer ones have both in rope_parameters, where "default" scales nothing.
    """
    plain = {k: v for k, v in table.items() if k not in ("rope_scaling", "rope_parameters")}
    given = [table.get(name) for name in ("rope_scaling", "rope_parameters")]
    rope: dict[object, object] = {}
    for one in given:
        if isinstance(one, Mapping):
            rope |= one
    if any(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        return {**plain, "rope_parameters": rope}
    theta = rope.pop("rope_theta", None)
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind)
    if theta is not None:
        plain["rope_theta"] = theta
    if kind not in (None, "default"):
        plain["rope_scaling"] = {"rope_type": kind, **{str(k): v for k, v in rope.items()}}
    return plain


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
