"""adapter_config.json, as far as a merge depends on it.

    {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": false, "fan_in_fan_out": false,
     "rank_pattern": {"layers.0.mlp.down_proj": 8}, "alpha_pattern": {".*k_proj": 64}}

The scale of a layer is alpha / r, or alpha / sqrt(r) with use_rslora (arXiv:2312.03732). A pattern
is a regular expression for the end of the layer's name; the first that fits counts.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar, final

from streammap.errors import CheckpointError

N = TypeVar("N", int, float)
_KINDS = {
    "IA3": "it scales activations",
    "LOHA": "a Hadamard product of products is no product of two matrices",
    "LOKR": "a Kronecker product is no product of two matrices",
    "ADALORA": "it has singular values of its own between the two matrices",
    "VERA": "its matrices are random, and not in the file",
    "OFT": "it rotates weights",
    "BOFT": "it rotates weights",
    "PROMPT_TUNING": "it changes the input, and no weight",
    "P_TUNING": "it changes the input, and no weight",
    "PREFIX_TUNING": "it changes the input of each layer, and no weight",
}
"""Types of adapters that are no LoRA -> why they are not merged."""
_VARIANTS = {
    "alora_invocation_tokens": "it acts from some tokens on only, so that no weight can have it",
    "use_qalora": "its inputs are pooled",
    "use_bdlora": "its matrices are block-diagonal",
    "layer_replication": "its layers are copies of the model's",
    "arrow_config": "it chooses among several adapters for each token",
    "kasa_config": "it needs the singular values of the weight",
    "monteclora_config": "its matrices are samples",
}
"""Fields that make a LoRA another thing -> why it is not merged."""
_CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin a training that change the model's own weights, which an adapter is then for."""
_MOST_LETTERS = 300
_MOST_PATTERNS = 10_000
_MOST_WAYS = 10_000_000
"""In which all patterns of a table could match a name: what a regular expression could try."""
_WAYS_OF_REPEATS = 1000


@final
@dataclass(frozen=True, slots=True)
class Settings:
    """What adapter_config.json says."""

    name: str
    """The adapter's, for messages."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    has_root: bool
    """use_rslora: whether alpha is divided by the root of the rank."""
    fan_in_fan_out: bool
    parameters: tuple[str, ...]
    """target_parameters: ends of names of parameters that are no module's `weight`."""
    base: str | None
    """The model that it was trained for."""
    tokens: Mapping[str, tuple[int, ...]]
    """trainable_token_indices: end of the name of an embedding -> tokens whose rows are trained;
    "" for any."""
    ties: bool
    """ensure_weight_tying: whether embedding and head are to stay one."""

    def rank_of(self, module: str) -> int:
        """The rank of a layer, by its name in the model."""
        return _first(self.rank_pattern, module, self.rank)

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The tokens whose rows of an embedding are trained; None where none is named."""
        return next((t for name, t in self.tokens.items() if f".{module}".endswith(name)), None)

    def scale_of(self, module: str) -> float:
        """What the product of a layer is multiplied by."""
        rank = self.rank_of(module)
        alpha = _first(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.has_root else rank)


def read(config: Mapping[str, object], *, name: str) -> Settings:
    """Read adapter_config.json.

    Args:
        name: The adapter's, for messages.

    Raises:
        CheckpointError: not a LoRA, a variant of it that is not merged, or a value that makes no
            sense.
    """
    where = f"{name}: adapter_config.json"
    _check_kind(config, where)
    table = _patterns(config, "alpha_pattern", where)
    ranks = _patterns(config, "rank_pattern", where)
    base = config.get("base_model_name_or_path")
    return Settings(
        name,
        _rank(config.get("r", 8), "r", where),
        _number(config.get("lora_alpha", 8), "lora_alpha", where),
        {key: _rank(value, f"rank_pattern {key!r}", where) for key, value in ranks.items()},
        {key: _number(value, f"alpha_pattern {key!r}", where) for key, value in table.items()},
        _flag(config, "use_rslora", where),
        _flag(config, "fan_in_fan_out", where),
        _names(config, "target_parameters", where),
        base if isinstance(base, str) and base else None,
        _tokens(config, where),
        _flag(config, "ensure_weight_tying", where),
    )


def _check_kind(config: Mapping[str, object], where: str) -> None:
    """Refuse what is no plain LoRA or DoRA, by its name."""
    kind = str(config.get("peft_type", "LORA"))[:_MOST_LETTERS]
    if kind != "LORA":
        why = f": {_KINDS[kind]}" if kind in _KINDS else ""
        raise CheckpointError(
            f"{where}: peft_type {kind}, expected LORA{why}",
            hint="merge it with peft (merge_and_unload), if peft can",
        )
    for field, why in _VARIANTS.items():
        if config.get(field):
            raise CheckpointError(
                f"{where}: {field} is set: {why}",
                hint="merge it with peft (merge_and_unload), if peft can",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {start[:_MOST_LETTERS]!r}: it is for a model whose own "
            "weights were changed before the training",
            hint="save it again with peft's path_initial_model_for_weight_conversion: that makes a "
            "plain LoRA of it",
        )


def _first(patterns: Mapping[str, N], module: str, default: N) -> N:
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return default


@functools.lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as peft reads it; `re` itself remembers 512, too few for one of each layer."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _patterns(config: Mapping[str, object], field: str, where: str) -> Mapping[str, object]:
    table = config.get(field) or {}
    if not isinstance(table, Mapping) or len(table) > _MOST_PATTERNS:
        raise CheckpointError(f"{where}: {field} is no table of patterns")
    ways = 0
    for pattern in map(str, table):
        _check_pattern(pattern, f"{where}: {field}")
        ways += _ways(pattern)
        if ways > _MOST_WAYS:
            raise CheckpointError(
                f"{where}: {field}: {pattern[:60]!r}: a name could match in more than "
                f"{_MOST_WAYS:,} ways (each repetition counts {_WAYS_OF_REPEATS})",
                hint="write the names of the layers out",
            )
    return table


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what is no regular expression, or repeats groups, which could take for ever."""
    if len(pattern) > _MOST_LETTERS or re.search(r"\)[*+{]", pattern):
        problem = "repeats a group" if len(pattern) <= _MOST_LETTERS else "a very long pattern"
        raise CheckpointError(
            f"{where}: {pattern[:60]!r}: {problem}: at most {_MOST_LETTERS} letters are tried, and "
            "repetitions of none of groups",
            hint="write the names of the layers out",
        )
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {pattern!r}: no regular expression: {error}") from error


def _ways(pattern: str) -> int:
    """In how many ways a pattern could match, at most: alternatives, options, repetitions."""
    made, alternatives = 1, [1]
    for sign in re.findall(r"\\.|\(\?|[|()*+{?]", pattern, re.DOTALL):
        if sign[0] == "(":
            alternatives.append(1)
        elif sign == ")" and len(alternatives) > 1:  # else it stands in brackets
            made *= alternatives.pop()
        elif sign == "|":
            alternatives[-1] += 1
        elif sign == "?":
            made *= 2
        elif sign in ("*", "+", "{"):
            made *= _WAYS_OF_REPEATS
    return made * math.prod(alternatives)


def _rank(value: object, what: str, where: str) -> int:
    if type(value) is not int or not 0 < value <= 2**20:
        raise CheckpointError(f"{where}: {what} is {str(value)[:60]}, expected a rank, 1 or more")
    return value


def _number(value: object, what: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CheckpointError(f"{where}: {what} is {str(value)[:60]}, expected a number")
    return float(value)


def _flag(config: Mapping[str, object], field: str, where: str) -> bool:
    value = config.get(field) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {field} is {str(value)[:60]}, expected true or false")
    return value


def _tokens(config: Mapping[str, object], where: str) -> Mapping[str, tuple[int, ...]]:
    given = config.get("trainable_token_indices") or {}
    table: Mapping[object, object] = given if isinstance(given, Mapping) else {"": given}
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in table.items():
        if not isinstance(tokens, list | tuple) or not all(type(n) is int for n in tokens):
            told = str(name or tokens)[:60]
            raise CheckpointError(f"{where}: trainable_token_indices: {told}: expected numbers")
        found[str(name)] = tuple(tokens)
    return found


def _names(config: Mapping[str, object], field: str, where: str) -> tuple[str, ...]:
    value = config.get(field) or ()
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: {field} is {str(value)[:60]}, expected names")
    return tuple(names)
