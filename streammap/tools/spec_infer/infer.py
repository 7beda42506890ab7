"""A first spec for a model type that no spec serves, found by asking its model class.

`probe` builds the model with one config field changed after the other, `solve` finds which fields
make up which dimension, `naming` turns these into axes and roles (with `module_roles`), and
`write_rules` and `write_tables` into TOML in the format of architectures/README.md. Shapes show
sizes, but neither the order inside a dimension nor factors of the forward pass: `repair` proves the
draft on a tiny model, tries what may be missing, and takes back what it can't prove.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streammap.tools.spec_infer import (
    completing,
    facts,
    module_roles,
    repair,
    shrink,
    solve,
    tiny_sizes,
)
from streammap.tools.spec_infer.amendments import Amendments
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.probe import Workbench
from streammap.tools.spec_infer.words import toml_value
from streammap.tools.spec_infer.write_rules import SpecRules
from streammap.tools.spec_infer.write_tables import SpecTables
from streammap.tools.spec_proof.checks import ProofReport

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
    report: ProofReport | None = None
    """Its proof, where one was asked for."""
    left_out: Mapping[str, str] | None = None
    """Axes that the proof did not show -> why; the spec does not resize or promise them."""


def named(config: Mapping[str, object], *, name: str) -> AxisNaming:
    """What probing the class of a config.json finds: the draft's axes, with their names.

    Args:
        config: Its content. Code that it names is never run.
        name: What messages call it.

    Raises:
        ArchitectureError: a model that transformers does not have, or can't build.
        PlanError: transformers is not installed.
    """
    bench = Workbench(config, name=name)
    completing.complete(bench)
    shrink.shorten(bench)
    bench.explicit(_GUESS)
    structure = module_roles.describe_model(bench.net())
    return AxisNaming(bench, structure, solve.solve(bench, structure))


def infer(config: Mapping[str, object], *, name: str, scratch: Path | None = None) -> Inferred:
    """A spec for the model of a config.json.

    Args:
        config: Its content. Code that it names is never run.
        name: What messages call it.
        scratch: A folder for tiny models, which prove and amend the spec; without one it is a
            draft.

    Raises:
        ArchitectureError: a model that transformers does not have, or can't build.
        PlanError: transformers is not installed.
    """
    start = time.perf_counter()
    naming = named(config, name=name)
    bench = naming.bench
    unresolved, kept = naming.unexplained()
    kept = (*kept, *SpecRules(naming).constants())

    def text(naming: AxisNaming, tiny: Workbench) -> str:
        notes = [f"# Kept as it is: {line}." for line in kept]
        rules = SpecRules(naming)
        tables = [rules.rules(), SpecTables(naming, rules).text()]
        model = _proof(tiny, naming.known)
        return "\n".join([*notes, *tables, facts.proved(naming, tiny.fields), *model])

    if scratch is None:
        tiny, wrong = tiny_sizes.prove_sizes(naming, next(iter(tiny_sizes.proposals(naming)), {}))
        toml, proved, n_probes = text(naming, tiny), None, tiny.n_probes
    else:
        proved = repair.prove(naming, text, scratch)
        toml, wrong, n_probes = proved.toml, proved.unresolved, proved.n_probes
    unresolved = (*unresolved, *wrong)
    return Inferred(
        toml="\n".join([*(f"# Not explained: {line}." for line in unresolved), toml]),
        model_type=bench.model_type,
        unresolved=unresolved,
        n_probes=bench.n_probes + n_probes,
        seconds=time.perf_counter() - start,
        report=None if proved is None else proved.report,
        left_out=None if proved is None else {**proved.known.frozen, **proved.known.inexact},
    )


def _proof(bench: Workbench, known: Amendments) -> list[str]:
    return [
        "[[proof.models]]",
        f"name = {toml_value(bench.model_type)}",
        f"class = {toml_value(bench.class_name)}",
        f"config = {toml_value(tiny_sizes.proof_config(bench))}",
        *([f"except = {toml_value(known.untested)}"] if known.untested else []),
        *([f"neutral = {toml_value([known.neutral])}"] if known.neutral else []),
        "",
    ]
