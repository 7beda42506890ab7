"""The manual's table: what resizing and blending do to the function of BERT, GPT-2 and DeiT.

    BERT                                    reference       exact
    L6-E384 -> L6-E768                        3.0e-07     ...

A figure is the mean absolute difference between the logits of two models on one random input: a row
of 512 tokens, or an image. This measure gives the manual's figures, but for what depends on the
random numbers: GPT-2's width comes out at 9.3e-02 to 1.0e-01, rounding errors at 1e-07 to 3e-07.
The two models that a row compares:

    L6-E384 -> L6-E768              the grown model, with the small one
    L6-E768 -> L6-E384              the grown model merged again, with the grown one
    L6-E384 -> L12-E384             the deeper model, with the shallow one
    L6-E384 -> L12-E384 -> L6-E384  the deeper model merged again, with the shallow one
    alpha 0.25                      a blend of two random models, with the one that alpha 0 gives

The models are made on the spot with transformers' own random initialization, saved, resized by
streammap file to file, and loaded again with from_pretrained. DeiT is transformers' ViT: without
the distillation token the two are one model. Blending knows no rule: both columns are alike.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from streammap import api
from streammap.common import optional
from streammap.errors import SchemeError
from streammap.planning import requests, scheme
from streammap.planning.requests import Groups
from streammap.planning.scheme import Scheme
from streammap.planning.tensor_maps.axis_change import Rule

if TYPE_CHECKING:
    from torch import Tensor

ModelName = Literal["BERT", "GPT-2", "DeiT"]
MODELS: tuple[ModelName, ...] = ("BERT", "GPT-2", "DeiT")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURE = "mean absolute difference of logits"
_CLASSES: Mapping[ModelName, tuple[str, str]] = {
    "BERT": ("AutoModelForMaskedLM", "BertConfig"),
    "GPT-2": ("AutoModelForCausalLM", "GPT2Config"),
    "DeiT": ("AutoModelForImageClassification", "ViTConfig"),
}
_LABELS = 1000
_COLUMNS = (34, 13, 12)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The small model of the table; the large one has twice the heads, or twice the layers."""

    heads: int
    head_dim: int
    layers: int
    vocab: int | None
    """None takes each model's own: 30522 for BERT, 50257 for GPT-2."""
    n_tokens: int
    """Length of a row of tokens."""
    image: int
    """Side of DeiT's images, in pixels; a patch has 16."""

    @property
    def name(self) -> str:
        """Layers and width: L6-E384."""
        return f"L{self.layers}-E{self.heads * self.head_dim}"

    @property
    def wide(self) -> "Sizes":
        """Twice the heads."""
        return replace(self, heads=2 * self.heads)

    @property
    def deep(self) -> "Sizes":
        """Twice the layers."""
        return replace(self, layers=2 * self.layers)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of the table."""

    model: ModelName
    name: str
    reference: float
    """Figure under the original's rule."""
    exact: float
    """Figure under the rule that keeps the function where it can."""


# 512 tokens: GPT-2's figures fall with the length (width, reference: 0.11 at 64, 0.10 at 512).
MANUAL = Sizes(heads=6, head_dim=64, layers=6, vocab=None, n_tokens=512, image=224)


def main(
    scheme: str | None, *, as_json: bool, echo: Callable[[str], None], sizes: Sizes = MANUAL
) -> None:
    """Print the table, each model's part as soon as it is known.

    Args:
        scheme: File with groups of the large model's heads and layers; None for i with i + n.
        as_json: One JSON object in place of the table.
        echo: Where a line goes.
        sizes: The small model.

    Raises:
        PlanError: transformers is not installed.
        SchemeError: a scheme that is not of 12 -> 6, at the manual's sizes.
    """
    groups = groups_for(sizes, scheme)
    rows: list[TableRow] = []
    if not as_json:
        echo(f"{MEASURE}, random models")
    for name in MODELS:
        found = compare(name, sizes, groups)
        rows += found
        if not as_json:
            echo(f"\n{as_text(found)}")
    if as_json:
        echo(json.dumps({"measure": MEASURE, "rows": [asdict(row) for row in rows]}, indent=2))


def compare(name: ModelName, sizes: Sizes, groups: Scheme) -> tuple[TableRow, ...]:
    """The rows of one model.

    Raises:
        PlanError: transformers is not installed.
    """
    with optional.quiet(), tempfile.TemporaryDirectory(prefix="streammap-") as folder:
        bench = _Bench(name, sizes, groups, Path(folder))
        reference, exact = bench.resized("reference"), bench.resized("exact")
        rows = [TableRow(name, step, reference[step], exact[step]) for step in exact]
        blends = bench.blended()
        rows += [TableRow(name, step, blends[step], blends[step]) for step in blends]
    return tuple(rows)


def as_text(rows: tuple[TableRow, ...]) -> str:
    """One model's rows under a headline."""
    left, first, second = _COLUMNS
    lines = [f"{rows[0].model:<{left}}{'reference':>{first}}{'exact':>{second}}"]
    lines += [f"{r.name:<{left}}{r.reference:>{first}.1e}{r.exact:>{second}.1e}" for r in rows]
    return "\n".join(lines)


def groups_for(sizes: Sizes, source: str | None) -> Scheme:
    """The scheme of a file, checked to be of twice `sizes` -> `sizes`; without one, i with i + n.

    Raises:
        SchemeError: a part that is missing, or of other sizes.
    """
    n_heads, n_layers = sizes.wide.heads, sizes.deep.layers
    if source is None:
        return Scheme(
            requests.uniform(n_heads, 2, "stacked", units="heads"),
            requests.uniform(n_layers, 2, "stacked", units="layers"),
        )
    found = scheme.load_scheme(source)
    _check_groups(source, "width_scheme", found.width, n_heads)
    _check_groups(source, "depth_scheme", found.depth, n_layers)
    return found


def _check_groups(source: str, entry: str, groups: Groups | None, n_large: int) -> None:
    problem = "is missing"
    if groups is not None:
        highest = max(member for group in groups for member in group)
        if len(groups) == n_large // 2 and highest < n_large:
            return
        problem = f"has {len(groups)} groups, the highest index is {highest}"
    raise SchemeError(
        f"{source}: {entry} {problem}; the table is of {n_large} -> {n_large // 2}",
        hint=f"give {n_large // 2} groups of the indices 0 to {n_large - 1}, as schemes/L6-H6.json",
    )


class _Config(Protocol):
    """A configuration of transformers, as far as it is used here."""

    vocab_size: int

    def to_dict(self) -> dict[str, object]: ...


class _Answer(Protocol):
    """What a model gives back."""

    logits: "Tensor"


class _Net(Protocol):
    """A model of transformers; its Auto class has the two makers."""

    @classmethod
    def from_config(cls, config: _Config) -> "_Net": ...
    @classmethod
    def from_pretrained(cls, folder: Path) -> "_Net": ...
    def save_pretrained(self, folder: Path) -> None: ...
    def eval(self) -> "_Net": ...
    def __call__(self, given: "Tensor") -> _Answer: ...


class _Bench:
    """Two random models of one size, in `folder`, and what the first answers to one input."""

    def __init__(self, name: ModelName, sizes: Sizes, groups: Scheme, folder: Path) -> None:
        self._name, self._sizes, self._groups = name, sizes, groups
        self._small, self._other = folder / "small", folder / "other"
        self._grown, self._result = folder / "grown", folder / "result"
        for seed, place in enumerate((self._small, self._other)):
            _random_model(name, sizes, seed).save_pretrained(place)
        self._input = _random_input(name, sizes)
        self._answer = self._logits(self._small)

    def resized(self, rule: Rule) -> dict[str, float]:
        """The rows of growing and merging again, in width and in depth."""
        small, wide, deep = self._sizes.name, self._sizes.wide.name, self._sizes.deep.name
        grown, merged = self._there_and_back(self._sizes.wide, rule)
        found = {
            f"{small} -> {wide}": _difference(grown, self._answer),
            f"{wide} -> {small}": _difference(merged, grown),
        }
        grown, merged = self._there_and_back(self._sizes.deep, rule)
        found[f"{small} -> {deep}"] = _difference(grown, self._answer)
        found[f"{small} -> {deep} -> {small}"] = _difference(merged, self._answer)
        return found

    def blended(self) -> dict[str, float]:
        """The rows of interpolation."""
        target = self._logits(self._other)
        found = {}
        for alpha in ALPHAS:
            lazy = api.open(self._small).interpolate(self._other, alpha=alpha)
            lazy.save(self._result, overwrite=True, fsync=False)
            found[f"alpha {alpha:g}"] = _difference(self._logits(self._result), target)
        return found

    def _there_and_back(self, large: Sizes, rule: Rule) -> tuple["Tensor", "Tensor"]:
        """Logits of the grown model, and of that merged again."""
        small, grown = api.open(self._small), self._grown
        target = _config(self._name, large).to_dict()
        lazy = small.decoalesce(scheme=self._groups, target=target, rule=rule)
        lazy.save(grown, overwrite=True, fsync=False)
        lazy = api.open(grown).coalesce(scheme=self._groups, target=small, rule=rule)
        lazy.save(self._result, overwrite=True, fsync=False)
        return self._logits(grown), self._logits(self._result)

    def _logits(self, folder: Path) -> "Tensor":
        # A function of its own: the model is gone before the next one is loaded.
        import torch

        model = _auto_class(self._name).from_pretrained(folder).eval()
        with torch.inference_mode():
            return model(self._input).logits


def _difference(a: "Tensor", b: "Tensor") -> float:
    return float((a - b).abs_().mean())


def _random_model(name: ModelName, sizes: Sizes, seed: int) -> _Net:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: _Net = _auto_class(name).from_config(_config(name, sizes))
    return model


def _random_input(name: ModelName, sizes: Sizes) -> "Tensor":
    import torch

    generator = torch.Generator().manual_seed(0)
    if name == "DeiT":
        return torch.randn(1, 3, sizes.image, sizes.image, generator=generator)
    n_tokens = _config(name, sizes).vocab_size
    return torch.randint(n_tokens, (1, sizes.n_tokens), generator=generator)


def _auto_class(name: ModelName) -> type[_Net]:
    found: type[_Net] = getattr(optional.library("transformers"), _CLASSES[name][0])
    return found


def _config(name: ModelName, sizes: Sizes) -> _Config:
    width, heads, layers = sizes.heads * sizes.head_dim, sizes.heads, sizes.layers
    fields = {"num_attention_heads": heads, "num_hidden_layers": layers, "hidden_size": width}
    if name == "DeiT":
        fields |= {"image_size": sizes.image, "num_labels": _LABELS}
    elif sizes.vocab is not None:
        fields |= {"vocab_size": sizes.vocab}
    if name != "GPT-2":
        fields |= {"intermediate_size": 4 * width}
    config: _Config = getattr(optional.library("transformers"), _CLASSES[name][1])(**fields)
    return config
