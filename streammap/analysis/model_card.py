"""The model card of a pushed result: what it was made of, how, and what is guaranteed."""

import re
from collections.abc import Iterator

from streammap.analysis import summary
from streammap.common.version import VERSION
from streammap.engine.options import Engine
from streammap.errors import StreammapError
from streammap.io.checkpoint import Checkpoint
from streammap.output import side_files
from streammap.planning.plan import Plan

PAPER = "2404.07999"
_OF_PAPER = frozenset({"coalesce", "decoalesce", "interpolate"})
"""The operators that the paper describes."""
_MAX_ROWS = 40
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_KEPT = re.compile(r"^(license|license_name|license_link|language): *(\S.*)$", re.MULTILINE)
_MAX_CARD_NBYTES = 10_000_000


def card(plan: Plan, engine: Engine, *, name: str) -> str:
    """README.md, with the metadata that the Hub reads.

    Args:
        name: The repository's.
    """
    lines = ["---", *_metadata(plan), "---", "", f"# {name.rpartition('/')[2]}", ""]
    made = f"Made by streammap {VERSION} from {', '.join(map(_named, plan.sources))}"
    if _is_of_paper(plan):
        made += (
            ", with the maps of *A Multi-Level Framework for Accelerating Training Transformer "
            f"Models* (ICLR 2024, [arXiv:{PAPER}](https://arxiv.org/abs/{PAPER}))"
        )
    lines += [f"{made}.", "", *_steps(plan)]
    promise, reason = plan.promise
    lines += [f"Guarantee: **{promise}** ({reason}).", "", *_formulas(plan, engine)]
    lines += [f"- note: {note}" for note in side_files.notes(plan)]
    files = (
        "`streammap.json` has the exact sources, steps and checksums; the map that was used, where "
        "there is one, is in `streammap.map.safetensors`."
    )
    lines += [
        "## Load it",
        "",
        "```python",
        "from transformers import AutoModel",
        "",
        f'model = AutoModel.from_pretrained("{name}")',
        "```",
        "",
        files,
    ]
    return "\n".join(lines) + "\n"


def _is_of_paper(plan: Plan) -> bool:
    return any(step.operator in _OF_PAPER for step in plan.steps)


def _steps(plan: Plan) -> Iterator[str]:
    if not plan.steps:
        return
    yield from ("## Steps", "")
    for step in plan.steps:
        options = ", ".join(f"{k}: {v}" for k, v in step.options.items() if v not in (None, {}, ()))
        yield f"- {step.operator} ({options})" if options else f"- {step.operator}"
    yield ""


def _metadata(plan: Plan) -> Iterator[str]:
    yield "library_name: transformers"
    repos = list(dict.fromkeys(s.origin["repo"] for s in plan.sources if "repo" in s.origin))
    if repos:
        yield "base_model:"
        yield from (f"- {repo}" for repo in repos)
    if plan.side is not None:
        yield from _kept(plan.side)
    yield "tags:"
    operators = dict.fromkeys(step.operator for step in plan.steps)
    paper = [f"arxiv:{PAPER}"] if _is_of_paper(plan) else []
    yield from (f"- {tag}" for tag in ("streammap", *operators, *paper))


def _kept(side: Checkpoint) -> Iterator[str]:
    """What the source's own card says of its licence and language."""
    place = side.place
    if place is None or place.file is not None or not place.has("README.md"):
        return
    text = place.read("README.md", limit=_MAX_CARD_NBYTES).decode(errors="replace")
    front = _FRONT.match(text)
    for field in _KEPT.finditer(front[1] if front else ""):
        yield f"{field[1]}: {field[2]}"


def _named(source: Checkpoint) -> str:
    origin = source.origin
    if "repo" in origin:
        return f"{origin['repo']} at commit `{origin['commit']}`"
    return origin.get("url", source.name)


def _formulas(plan: Plan, engine: Engine) -> Iterator[str]:
    try:
        figures = summary.summarize(plan, engine)
    except StreammapError:
        return
    sizes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in figures.sizes.items())
    if sizes:
        yield f"Sizes: {sizes}."
        yield ""
    yield "| tensors | shape | formula |"
    yield "|---|---|---|"
    for row in figures.rows[:_MAX_ROWS]:
        shape = (
            f"{list(row.before)} -> {list(row.after)}"
            if row.before != row.after
            else (f"{list(row.after)}")
        )
        yield f"| `{row.pattern}` | {shape} | {row.formula} |"
    if len(figures.rows) > _MAX_ROWS:
        yield f"| {len(figures.rows) - _MAX_ROWS} more | | |"
    yield ""
