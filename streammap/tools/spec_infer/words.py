"""Words of config.json and of TOML that several parts of an inferred spec know."""

import json
import math
import re
from collections.abc import Mapping

_PER_TOKEN = re.compile(
    r"experts_per_tok|top_k$|topk$|top_k_experts|n_group$|topk_group$|expert_groups?$"
)
INDEX_LIST = re.compile(r"layers$|layers?_ids$|indexes$|indices$|idx$")
"""Lists of layer numbers."""
_LONG = 400
"""A list of more letters is written one entry a line: readers refuse lines of many dots."""


def grows_with_experts(leaf: str, value: int, n_experts: int) -> bool:
    """Whether a field must grow with the number of experts: how many a token takes, or groups."""
    # What picks more than there are experts picks something else: DeepSeek's index_topk tokens.
    return bool(_PER_TOKEN.search(leaf)) and value <= n_experts


def toml_value(value: object) -> str:
    """A TOML value."""
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{toml_key(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, (list, tuple)):
        entries = [toml_value(v) for v in value if v is not None]
        if sum(map(len, entries)) > _LONG:
            return "[\n" + "".join(f"    {entry},\n" for entry in entries) + "]"
        return "[" + ", ".join(entries) + "]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else str(value)


def toml_key(name: str) -> str:
    """A TOML key, in quotes where it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
