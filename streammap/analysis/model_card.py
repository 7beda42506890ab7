"""The model card of a result that is pushed: what it was made of, how, and what that promises."""

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
    made = (
        f"Made by streammap {VERSION} from {', '.join(map(_named, plan.sources))}, with the maps "
        "of *A Multi-Level Framework for Accelerating Training Transformer Models* (ICLR 2024, "
        f"[arXiv:{PAPER}](https://arxiv.org/abs/{PAPER}))."
    )
    lines += [made, "", "## Steps", ""]
    for step in plan.steps:
        options = ", ".join(f"{k}: {v}" for k, v in step.options.items() if v not in (None, {}, ()))
        lines.append(f"- {step.operator} ({options})" if options else f"- {step.operator}")
    promise, reason = plan.promise
    lines += ["", f"Promise: **{promise}** ({reason}).", "", *_formulas(plan, engine)]
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
    yield from (f"- {tag}" for tag in ("streammap", *operators, f"arxiv:{PAPER}"))


def _kept(side: Checkpoint) -> Iterator[str]:
    """What the source's own card says of its licence and language."""
    place = side.place
    if place is None or place.file is not None or not place.has("README.md"):
        return
    text = place.read("README.md", limit=_MAX_CARD_NBYTES).decode(errors="replace")
    front = _FRONT.match(text)
    for found in _KEPT.finditer(front[1] if front else ""):
        yield f"{found[1]}: {found[2]}"


def _named(source: Checkpoint) -> str:
    origin = source.origin
    if "repo" in origin:
        return f"{origin['repo']} at commit `{origin['commit']}`"
    return origin.get("url", source.name)


def _formulas(plan: Plan, engine: Engine) -> Iterator[str]:
    try:
        found = summary.summarize(plan, engine)
    except StreammapError:
        return
    sizes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in found.sizes.items())
    if sizes:
        yield f"Sizes: {sizes}."
        yield ""
    yield "| tensors | shape | formula |"
    yield "|---|---|---|"
    for row in found.rows[:_MAX_ROWS]:
        shape = (
            f"{list(row.before)} -> {list(row.after)}"
            if row.before != row.after
            else (f"{list(row.after)}")
        )
        yield f"| `{row.pattern}` | {shape} | {row.formula} |"
    if len(found.rows) > _MAX_ROWS:
        yield f"| {len(found.rows) - _MAX_ROWS} more | | |"
    yield ""
