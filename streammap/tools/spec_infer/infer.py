"""A first spec for a model type that no spec serves, found by asking its model class.

`solving` says which config fields make up which dimension, `meanings` makes axes and rules of it,
`spectext` and `spectables` a TOML text in the format of architectures/README.md. Shapes show sizes,
and neither the order inside a dimension nor factors of the forward pass: the text says what is a
guess, and `streammap spec verify` finds what is wrong.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from streammap.tools.spec_infer import model_structure, shrinking, solving
from streammap.tools.spec_infer.axis_naming import AxisNaming
from streammap.tools.spec_infer.probing import Workbench
from streammap.tools.spec_infer.spec_tables import SpecTables
from streammap.tools.spec_infer.spec_text import SpecRules, toml_value

_GUESS = 88
"""For sizes that are null in config.json, which means "as usual"."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """A spec that was found by probing."""

    toml: str
    model_type: str
    unresolved: tuple[str, ...]
    """What no config field explains, one line each."""
    n_probes: int
    """Models that were built."""
    seconds: float


def infer(config: Mapping[str, object], *, name: str) -> Inferred:
    """A spec for the model of a config.json.

    Args:
        config: Its content. Code that it names is never run.
        name: What messages call it.

    Raises:
        ArchitectureError: a model that transformers does not have, or can't build.
        PlanError: transformers is not installed.
    """
    start = time.perf_counter()
    bench = Workbench(config, name=name)
    shrinking.shorten(bench)
    bench.explicit(_GUESS)
    parts = model_structure.of(bench.net())
    meanings = AxisNaming(bench, parts, solving.solve(bench, parts))
    text = SpecRules(meanings)
    tables = [text.rules(), SpecTables(meanings, text).text()]
    unresolved, kept = meanings.unexplained()
    kept = (*kept, *text.constants())
    unresolved = (*unresolved, *shrinking.prove_sizes(meanings))
    proof = [
        "[[proof.models]]",
        f"name = {toml_value(bench.model_type)}",
        f"class = {toml_value(bench.class_name)}",
        f"config = {toml_value(shrinking.proof_config(bench))}",
        "",
    ]
    notes = [f"# Not explained: {line}." for line in unresolved]
    notes += [f"# Kept as it is: {line}." for line in kept]
    toml = "\n".join([*notes, *tables, *proof])
    seconds = time.perf_counter() - start
    return Inferred(toml, bench.model_type, unresolved, bench.n_probes, seconds)
