"""Commands about architecture specs: `architectures`, `spec verify`, `spec infer`."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streammap.cli.help import Command, Group
from streammap.cli.options import ARCH, PATH, json_option, option
from streammap.errors import ArchitectureError, printable

if TYPE_CHECKING:
    from streammap.tools.spec_proof.checks import ProofReport


@click.command(cls=Command, examples=("architectures", "architectures --coverage"))
@option(
    "--coverage",
    "counts",
    is_flag=True,
    help="Count transformers' model types by task, and say why some have no spec.",
)
@json_option
def architectures(counts: bool, as_json: bool) -> None:
    """List the supported model types, and which growth is exact for each.

    --coverage needs transformers: pip install transformers.
    """
    from streammap.analysis import architectures_table, coverage

    table = coverage.coverage() if counts else architectures_table.listing()
    click.echo(json.dumps(table.as_json(), indent=2) if as_json else str(table))


@click.group(cls=Group, examples=("spec verify gpt2",))
def spec() -> None:
    """Write and test architecture specs."""


@spec.command(examples=("spec verify gpt2",))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=ARCH)
@option("--model", metavar="MODEL", help="Only this one of the spec's tiny models.")
@json_option
@click.pass_context
def verify(ctx: click.Context, /, names: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Test specs (names, or *.toml files) on tiny random models, by comparing outputs.

    Each model under a spec's [proof] is made with random float64 weights, then permuted and doubled
    through files and from_pretrained. A spec without such a model fails.
    Needs transformers: pip install transformers.
    """
    from streammap.tools.spec_proof import checks

    reports: list[ProofReport] = []
    chosen = checks.chosen(names, name=model)
    with tempfile.TemporaryDirectory(prefix="streammap-") as folder:
        for i, (arch, tiny) in enumerate(chosen):
            reports.append(checks.prove(tiny, arch, Path(folder) / str(i)))
            if not as_json:
                click.echo(_lines_of(reports[-1]))
    if as_json:
        click.echo(json.dumps({"reports": [asdict(report) for report in reports]}, indent=2))
    failed = [report.model for report in reports if not report.passed]
    if failed:
        error = ArchitectureError(
            f"{len(failed)} of {len(reports)} models fail: {', '.join(failed)}",
            hint="the messages name the axis; correct its dimensions or roles in the spec",
        )
        if not as_json:
            raise error
        click.echo(f"error: {error}", err=True)  # stdout has its one object: the reports
        ctx.exit(1)


@spec.command(examples=("spec infer bert-base-uncased/ > mine.toml",))
@click.argument("source", metavar="CHECKPOINT", type=PATH)
@option("--name", metavar="NAME", help="Name of the spec. [default: the model type]")
@option(
    "--verify/--no-verify",
    "proves",
    default=True,
    show_default=True,
    help="Prove and amend it on a tiny model; the report goes to stderr.",
)
@json_option
@click.pass_context
def infer(
    ctx: click.Context, /, source: str, name: str | None, proves: bool, as_json: bool
) -> None:
    """Write a spec for an unsupported model type, by probing its model class.

    Only transformers' own classes are used; no code of the checkpoint is run. CHECKPOINT is its
    folder or its config.json. What its proof does not show is not resized or not promised, and
    the first lines say so. Exit code 1: the spec fails its proof all the same.
    Needs transformers: pip install transformers.
    """
    from streammap.io.json_files import read_config
    from streammap.tools.spec_infer import infer as inference

    config = read_config(source)
    name = name or str(config.get("model_type", "mine"))
    with tempfile.TemporaryDirectory(prefix="streammap-") as folder:
        inferred = inference.infer(config, name=name, scratch=Path(folder) if proves else None)
    reports = [] if inferred.report is None else [inferred.report]
    left_out = inferred.left_out or {}
    failures = [_failure(report) for report in reports if not report.passed]
    lines = [f"# FAILED: {line}\n" for line in failures]
    lines += [f"# Not promised: {axis}: {why}.\n" for axis, why in left_out.items()]
    toml = "".join([*lines, inferred.toml])
    if as_json:
        report_json = {
            "model_type": inferred.model_type,
            "toml": toml,
            "unresolved": list(inferred.unresolved),
            "left_out": dict(left_out),
            "n_probes": inferred.n_probes,
            "seconds": inferred.seconds,
            "reports": [asdict(report) for report in reports],
        }
        click.echo(json.dumps(report_json, indent=2))
        ctx.exit(1 if failures else 0)
    click.echo(toml)
    click.echo(f"{inferred.n_probes} probes in {inferred.seconds:.1f} s", err=True)
    for line in inferred.unresolved:
        click.echo(f"not resolved: {line}", err=True)
    for axis, why in left_out.items():
        click.echo(f"not promised: {axis}: {why}", err=True)
    for report in reports:
        click.echo(_lines_of(report), err=True)
    ctx.exit(1 if failures else 0)


def _failure(report: "ProofReport") -> str:
    """What of a model fails first, in one line."""
    check = next(check for check in report.checks if not check.passed)
    return printable(f"{report.model}: {check.name}: {check.message or check.error}")


def _lines_of(report: "ProofReport") -> str:
    """One model's checks in a few lines."""
    lines = [f"{report.model}: {'passed' if report.passed else 'FAILED'}"]
    for check in report.checks:
        error = "" if check.error is None else f"{check.error:.1e}"
        sign = "ok" if check.passed else "FAILED"
        lines.append(f"  {check.name:<12} {sign:<7} {error:<8} {check.message}".rstrip())
    return "\n".join(lines)
