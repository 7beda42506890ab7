"""A draft that is proved, and amended until it passes.

What shapes don't show makes the same few faults again and again: a factor sqrt(hidden size) behind
the embeddings, norms taken for pre-norms, the order inside a fused dimension. Each is tried where
the proof names the axis that it concerns, and kept where the proof gets better by it. An axis that
none of them helps is not resized, and the spec says so: what is left is what was proved.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streammap.architectures import registry
from streammap.errors import ArchitectureError, StreammapError
from streammap.tools.spec_infer import completing, solve, tiny_sizes
from streammap.tools.spec_infer.amendments import (
    NO_RULE,
    ORDERS,
    POSITIONS,
    UNSEEN,
    Amendments,
    Neutral,
)
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.probe import Workbench
from streammap.tools.spec_proof import checks, unseen
from streammap.tools.spec_proof.checks import Check, CheckName, ProofReport

_MAX_ROUNDS = 24
_MAX_JOINED = 5
_OUTPUT = re.compile(r"hidden_size$|output_dim$|projection_dim$|^dim$|embed_dim$|d_model$")
_TOKENS = re.compile(r"embed_tokens$|word_embeddings$")
_NAMED_OUTPUT = re.compile(r"out_\w+$|output_dim$|projection_dim$")
_EVERY_LAYER = 100_000
_COMPUTED: Mapping[Neutral, tuple[str, ...]] = {
    "sinusoidal": ("sinusoid", "positionalencoding", "positional_encoding"),
    "alibi": ("alibi",),
}
"""What a class calls positions that it computes."""
_GATES = ("renormalised", "softmax", "own")
_LAYERS = "layers that were added to a tiny model changed its function"
_EXPERTS = "experts that were added to a tiny model changed its function"


@dataclass(frozen=True, slots=True)
class Proved:
    """A spec after its proof."""

    toml: str
    report: ProofReport
    known: Amendments
    unresolved: tuple[str, ...]
    """What the tiny model contradicts, one line each."""
    n_probes: int
    """Models that were built to find a tiny one."""


_Text = Callable[[AxisNaming, Workbench], str]
"""Writes a spec, with a tiny model."""


def prove(naming: AxisNaming, text: _Text, scratch: Path) -> Proved:
    """Prove a draft, and amend it as long as that helps.

    Args:
        naming: What is known of the model.
        text: Writes the spec.
        scratch: Folder for tiny models.

    Raises:
        ArchitectureError: no sizes make a tiny model.
    """
    if "width" not in naming.kinds.values():
        raise ArchitectureError(
            f"{naming.bench.model_type}: no dimension is that of one field which its tensors both "
            "make and read: it has one size a stage, or none",
            hint="write a spec by hand: convnext.toml has one axis for each stage",
        )
    known = Amendments()
    proof, wrong = _running(naming, text, scratch)
    naming, report = proof.naming, proof.until_it_fails(known)
    if idle := proof.unseen() if report.checks[0].passed else ():
        known = _all_frozen(naming, known, idle, UNSEEN)
        report = proof.until_it_fails(known)
    for _ in range(_MAX_ROUNDS):
        failed = next((check for check in report.checks if not check.passed), None)
        if failed is None or failed.name == "source":
            break
        better = next(
            (
                c
                for c in _candidates(naming, known, failed)
                if _helps(proof.of(c, failed.name, failed.axes), failed)
            ),
            None,
        )
        if better is None:
            break
        known, report = better, proof.until_it_fails(better)
    report = report if report.passed else proof.of(known)
    return Proved(proof.toml(known), report, known, wrong, proof.tiny.n_probes)


def _running(naming: AxisNaming, text: _Text, scratch: Path) -> tuple["_Proof", tuple[str, ...]]:
    """A tiny model that runs; where none does, the first."""
    first: tuple[_Proof, tuple[str, ...]] | None = None
    for i, (other, sizes) in enumerate(_proposed(naming)):
        tiny, wrong = tiny_sizes.prove_sizes(other, sizes)
        folder = scratch / str(i)
        folder.mkdir()
        found = _Proof(other, tiny, text, folder), wrong
        first = first or found
        if found[0].of(Amendments(), "source").passed:
            return found
    if first is None:
        raise ArchitectureError(
            f"{naming.bench.model_type}: no tiny model of its class can be built",
            hint="give a config.json with small sizes, or write a spec by hand",
        )
    return first


def _proposed(naming: AxisNaming) -> Iterator[tuple[AxisNaming, dict[str, object]]]:
    """What is known of the model, and sizes: such that all differ first, whatever is joined.

    Sizes that are equal by chance run where two fields must be equal, which nothing says then.
    """
    some = tuple(itertools.islice(_joined(naming), _MAX_JOINED))
    tried: list[dict[str, object] | None] = []
    for one in some:
        tried.append(next(tiny_sizes.proposals(one, different=True), None))
        yield from ((one, sizes) for sizes in tried[-1:] if sizes is not None)
    for one, first in zip(some, tried, strict=True):
        yield from ((one, sizes) for sizes in tiny_sizes.proposals(one) if sizes != first)


def _joined(naming: AxisNaming) -> Iterator[AxisNaming]:
    """As it is; or with the output of an encoder as wide as the text model, which adds it up."""
    yield naming
    hidden = naming.residual()
    text = next((s for s in naming.names if s.startswith("text_config.hidden_size")), hidden)
    wide: list[str] = []
    for symbol in naming.names:
        scope, _, leaf = symbol.rpartition(".")
        inside = scope or text.rpartition(".")[0]  # Of a model in parts, the field between them.
        if symbol != text and inside and _OUTPUT.search(leaf):
            wide.append(symbol)
    named = [symbol for symbol in wide if _NAMED_OUTPUT.search(symbol)]
    # A model that sees and hears has two encoders.
    together = [(symbol, text) for symbol in named]
    alone = [[(symbol, text)] for symbol in wide]
    read = [[pair] for pair in completing.read_widths(naming.bench)]
    for pairs in ([together] if len(named) > 1 else []) + read + alone:
        solution = naming.solution
        for symbol, other in pairs:
            solution = solve.joined(solution, symbol, other)
        yield AxisNaming(naming.bench, naming.anatomy, solution)


class _Proof:
    """Specs written, and proved."""

    def __init__(self, naming: AxisNaming, tiny: Workbench, text: _Text, scratch: Path) -> None:
        self.naming, self.tiny, self._text, self._scratch = naming, tiny, text, scratch
        self.n_proofs = 0

    def toml(self, known: Amendments) -> str:
        """The spec."""
        return self._text(self.naming.amended(known), self.tiny)

    def unseen(self) -> tuple[str, ...]:
        """Axes of the model that was built last with which it does not compute."""
        (file,) = (self._scratch / str(self.n_proofs)).glob("*.toml")
        (tiny,) = registry.tiny_models(str(file))
        with contextlib.suppress(StreammapError):  # A draft of wrong shapes: growth tells them.
            return unseen.axes(tiny, str(file), file.parent / "models" / "source")
        return ()

    def until_it_fails(self, known: Amendments) -> ProofReport:
        """Its proof up to the first check that fails."""
        return self._prove(known, quick=True)

    def of(
        self, known: Amendments, only: CheckName | None = None, suspects: tuple[str, ...] = ()
    ) -> ProofReport:
        """Its proof, or one check of it; what fails in that is looked for among suspects."""
        wanted = checks.CHECKS if only is None else (only,)
        return self._prove(known, only=wanted, suspects=suspects, quick=bool(suspects))

    def _prove(
        self,
        known: Amendments,
        *,
        only: tuple[CheckName, ...] = checks.CHECKS,
        suspects: tuple[str, ...] = (),
        quick: bool = False,
    ) -> ProofReport:
        self.n_proofs += 1
        folder = self._scratch / str(self.n_proofs)
        folder.mkdir()
        file = folder / f"{self.naming.bench.model_type}.toml"
        file.write_text(self.toml(known), encoding="utf-8")
        (tiny,) = registry.tiny_models(str(file))
        models = folder / "models"
        return checks.prove(tiny, str(file), models, only=only, suspects=suspects, quick=quick)


def _helps(report: ProofReport, before: Check) -> bool:
    """Whether a check passes, or fails for fewer axes."""
    after = report.checks[-1]
    if after.passed and after.name == before.name:
        return True
    return after.name == before.name and 0 < len(after.axes) < len(before.axes)


def _candidates(naming: AxisNaming, known: Amendments, failed: Check) -> Iterator[Amendments]:
    """Amendments that may be what is missing, the likely ones first."""
    if failed.name == "promises":
        yield from _promises(naming, known, failed)
    elif failed.axes:
        for some in (known, *_without_positions(naming, known, failed)):
            if some != known:
                yield some
            for axis in failed.axes:
                yield from _rules(naming, some, failed, axis)
            yield from _ordered(naming, some, failed)
        for axis in failed.axes:
            yield _frozen(naming, known, axis)
        yield _all_frozen(naming, known, failed.axes)
    elif failed.name in ("shrink", "missing", "growth"):
        if failed.name == "missing":
            yield replace(known, derives=False)
        yield from _without_depth(naming, known)


def _rules(naming: AxisNaming, known: Amendments, failed: Check, axis: str) -> Iterator[Amendments]:
    if axis in naming.residuals():
        if failed.name == "permutation":
            yield replace(known, unsigned={**known.unsigned, axis: "signs changed the function"})
        scales = _scales(naming, axis)
        posts = [known.post, not known.post]
        for post in posts:
            without = {k: v for k, v in known.scale.items() if k not in scales}
            for scale in (without, {**without, **scales}) if scales else (without,):
                for head_scale in ("", f"{axis}**-0.5") if scales else (known.head_scale,):
                    one = replace(known, post=post, scale=scale, head_scale=head_scale)
                    if one != known:
                        yield one
        if scales or axis == naming.names.get(naming.residual()):
            yield from (replace(known, head_norm=key) for key in _norms(naming, axis))


def _ordered(naming: AxisNaming, known: Amendments, failed: Check) -> Iterator[Amendments]:
    """Other orders of units: of all axes that fail first, then of each."""
    texts = {_texts(naming, known)}
    alone = [(axis,) for axis in failed.axes] if len(failed.axes) > 1 else []
    for axes, order in itertools.product((failed.axes, *alone), ORDERS):
        other = known.ordered(axes, order)
        if (text := _texts(naming, other)) not in texts:
            texts.add(text)
            yield other


def _texts(naming: AxisNaming, known: Amendments) -> tuple[str, ...]:
    """All dimensions as the spec has them."""
    other = naming.amended(known)
    return tuple(other.text_of(t, i) for t in naming.tensors for i in range(len(t.dims)))


def _without_positions(
    naming: AxisNaming, known: Amendments, failed: Check
) -> Iterator[Amendments]:
    """The tiny model without positions that are computed from a width, or from a head's number."""
    for neutral, why in POSITIONS.items():
        if known.neutral is None and any(map(naming.bench.mentions, _COMPUTED[neutral])):
            widths = naming.residuals()
            axes = [axis for axis in failed.axes if (axis in widths) == (neutral == "sinusoidal")]
            yield replace(known, neutral=neutral, caveats=dict.fromkeys(axes, why))


def _scales(naming: AxisNaming, axis: str) -> dict[str, str]:
    """The embeddings' output times sqrt(hidden size), as in "Attention is all you need"."""
    anatomy = naming.anatomy
    tokens = {anatomy.input_embedding}
    if anatomy.input_embedding and (key := anatomy.keys.get(anatomy.input_embedding)):
        tokens |= {name for name, of in anatomy.tied.items() if of == key and "embed" in name}
    embeddings = [
        tensors
        for tensors in naming.tensors
        if tensors.part.path in tokens
        or tensors.pattern in tokens
        or (tensors.part.kind == "embedding" and _TOKENS.search(tensors.part.path))
    ]
    # A model in parts has other axes than that of its tokens.
    wide = (t for t in embeddings if naming.text_of(t, len(t.dims) - 1) == axis)
    return dict.fromkeys((tensors.pattern for tensors in wide), f"{axis}**0.5")


def _norms(naming: AxisNaming, axis: str) -> list[str]:
    """Norms of hidden units outside the layers, which may be the one before the head."""
    keys = [naming.anatomy.keys.get(norm.path, "") for norm in naming.anatomy.norms]
    return [
        key
        for key in keys
        if key
        and not naming.in_stack(key)
        and naming.expression(naming.solution.dims[key][-1]) == axis
    ]


def _frozen(naming: AxisNaming, known: Amendments, axis: str, why: str = NO_RULE) -> Amendments:
    if naming.kinds.get(axis) in ("expert", "depth"):
        return replace(
            known, untested=(*known.untested, axis), inexact={**known.inexact, axis: why}
        )
    together = dict.fromkeys(_bound(naming, axis), why)
    return replace(known, frozen={**known.frozen, **together})


def _bound(naming: AxisNaming, axis: str) -> list[str]:
    """An axis, and those that are not resized without it.

    A width that is heads times a head size is resized with its heads, or not at all; and where
    heads stay, what they share can't grow with them.
    """
    bound = [axis]
    widths = list(naming.solution.head_sizes.values())
    follow = [*widths, *((heads, width) for width, heads in widths)]
    follow += naming.solution.groups.values()
    for one in bound:
        others = (naming.names.get(b) for a, b in follow if naming.names.get(a) == one)
        bound += dict.fromkeys(other for other in others if other and other not in bound)
    return bound


def _all_frozen(
    naming: AxisNaming, known: Amendments, axes: tuple[str, ...], why: str = NO_RULE
) -> Amendments:
    for axis in axes:
        known = _frozen(naming, known, axis, why)
    return known


def _promises(naming: AxisNaming, known: Amendments, failed: Check) -> Iterator[Amendments]:
    if "experts:" in failed.message:
        yield from (replace(known, gates=gates) for gates in _GATES)
        yield from (replace(known, single=True, gates=gates) for gates in _GATES)
        experts = dict.fromkeys(_axes(naming, "expert"), _EXPERTS)
        yield replace(known, inexact={**known.inexact, **experts})
    layers = [axis for axis in _axes(naming, "depth") if axis not in known.inexact]
    alone = [axis for axis in layers if axis in failed.axes]
    yield from _ones(naming, known, alone)
    yield from (
        replace(known, numbered={**known.numbered, axis: _EVERY_LAYER})
        for axis in alone
        if axis not in known.numbered
    )
    behind = [axis for axis in alone if naming.ends_in_norm(axis) and axis not in known.posts]
    if behind:
        yield replace(known, posts=(*known.posts, *behind))
    for some in (alone, layers) if alone else (layers,):
        yield replace(known, inexact={**known.inexact, **dict.fromkeys(some, _LAYERS)})


def _ones(naming: AxisNaming, known: Amendments, axes: list[str]) -> Iterator[Amendments]:
    """Factors of the residual stream: vectors of a layer that are no norm's and no bias."""
    for axis in axes:
        scales = {
            tensors.pattern
            for tensors in naming.tensors
            if f"{{{axis}}}" in tensors.pattern
            and tensors.part.kind in ("other", "buffer")
            and len(tensors.dims) == 1
            and "bias" not in tensors.part.parameter
        }
        own = {one for one in scales if "." not in one.partition(f"{{{axis}}}.")[2]}
        for some in (own, scales, *({one} for one in sorted(scales))):
            if some and not some <= set(known.ones):
                yield replace(known, ones=tuple(sorted(some | set(known.ones))))


def _without_depth(naming: AxisNaming, known: Amendments) -> Iterator[Amendments]:
    layers = [axis for axis in _axes(naming, "depth") if axis not in known.untested]
    for some in (*([axis] for axis in layers), layers):
        inexact = {**known.inexact, **dict.fromkeys(some, NO_RULE)}
        yield replace(known, inexact=inexact, untested=(*known.untested, *some))


def _axes(naming: AxisNaming, kind: str) -> list[str]:
    return [axis for axis, one in naming.kinds.items() if one == kind]
