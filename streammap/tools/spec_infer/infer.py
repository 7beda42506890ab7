"""A first spec for a model type that no spec serves, found by asking its model class.

`probe` builds the model with one config field changed after the other, `solve` finds which fields
make up which dimension, `naming` turns these into axes and roles (with `module_roles`), and
`write_rules` and `write_tables` into TOML in the format of architectures/README.md. Shapes show
sizes, but neither the order inside a dimension nor factors of the forward pass: the text marks its
guesses, and `streammap spec verify` finds what is wrong.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from streammap.tools.spec_infer import facts, module_roles, shrink, solve
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.probe import Workbench
from streammap.tools.spec_infer.write_rules import SpecRules, toml_value
from streammap.tools.spec_infer.write_tables import SpecTables

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
    shrink.shorten(bench)
    bench.explicit(_GUESS)
    structure = module_roles.describe_model(bench.net())
    naming = AxisNaming(bench, structure, solve.solve(bench, structure))
    text = SpecRules(naming)
    tables = [text.rules(), SpecTables(naming, text).text()]
    unresolved, kept = naming.unexplained()
    kept = (*kept, *text.constants())
    unresolved = (*unresolved, *shrink.prove_sizes(naming))
    proof = [
        "[[proof.models]]",
        f"name = {toml_value(bench.model_type)}",
        f"class = {toml_value(bench.class_name)}",
        f"config = {toml_value(shrink.proof_config(bench))}",
        "",
    ]
    notes = [f"# Not explained: {line}." for line in unresolved]
    notes += [f"# Kept as it is: {line}." for line in kept]
    toml = "\n".join([*notes, *tables, facts.proved(naming), *proof])
    seconds = time.perf_counter() - start
    return Inferred(toml, bench.model_type, unresolved, bench.n_probes, seconds)
