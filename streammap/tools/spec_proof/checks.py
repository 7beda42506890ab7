"""Test a spec by function: tiny random models, resized through files, compute the same.

Each model of a spec's [proof] is made, saved and resized by streammap, and loaded again by its own
library, which must find each key it wants and no other:

    source       it is made, saved, loaded and run
    growth       every width axis x 2: the same outputs; where not, the axes that change them
    round trip   the grown model merged again by its saved map: the source, bit for bit
    permutation  every width axis in random order, experts too: the same outputs
    shrink       twice the width and depth, and half of that in other groups: both of them run
    promises     other growth with a guarantee (experts, head size, layers): the same outputs
    missing      config.json without the lists that loaders derive: layers come and go as with them

Outputs are compared number by number where they are logits. Hidden states, of a model without a
head, have a width that is resized: there the sorted numbers of a position are compared, each of the
source's as often as it was copied. Where a permutation negates units, magnitudes are.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from streammap import api
from streammap.api import LazyCheckpoint
from streammap.architectures import config_fields, registry
from streammap.architectures.schema import AxisKind, TinyModel
from streammap.errors import ArchitectureError, PlanError, StreammapError, some
from streammap.operators.kinds import RequestLike
from streammap.operators.ordering.permute import Permute
from streammap.output.save_options import ClassCheck
from streammap.planning.ordering import units
from streammap.planning.plan import Promise
from streammap.planning.requests import Grouping
from streammap.tools.spec_proof import comparison, layer_ways, missing_lists, tiny_models
from streammap.tools.spec_proof.blame import Changed, by_axis, told
from streammap.tools.spec_proof.comparison import TOLERANCE
from streammap.tools.spec_proof.layer_ways import Way

CheckName = Literal[
    "source", "growth", "round trip", "permutation", "shrink", "promises", "missing"
]
CHECKS: tuple[CheckName, ...] = (
    "source",
    "growth",
    "round trip",
    "permutation",
    "shrink",
    "promises",
    "missing",
)
_ROUNDING = 2.0**-50
_ALLOWED: Mapping[Promise, float] = {
    "bit-exact": 0.0,
    "exact": TOLERANCE,
    "exact up to eps": 1e-3,
}


@dataclass(frozen=True, slots=True)
class Check:
    """What one check of one model found."""

    name: CheckName
    passed: bool
    error: float | None
    """Largest difference / largest number, of the outputs; None where nothing was compared."""
    message: str
    """What went wrong, or why nothing was compared."""
    axes: tuple[str, ...] = ()
    """Those whose change alone goes wrong, where a change of all axes does; broken promises."""


@dataclass(frozen=True, slots=True)
class ProofReport:
    """All checks of one model."""

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether each check did."""
        return all(check.passed for check in self.checks)


def chosen(archs: Sequence[str], *, name: str | None = None) -> list[tuple[str, TinyModel]]:
    """The tiny models under [proof] of some specs, each with its spec.

    Args:
        archs: Names of specs, or their files (*.toml).
        name: The only model to take; None for all.

    Raises:
        ArchitectureError: no such spec, a spec without models, or none of them has this name.
    """
    known = [(arch, registry.tiny_models(arch)) for arch in archs]
    for arch, models in known:
        if not models:
            raise ArchitectureError(
                f"{arch}: no model under [proof], so that nothing can be tested",
                hint="add a tiny model: name, class and config under [[proof.models]]",
            )
    pairs = [(arch, model) for arch, models in known for model in models]
    named = [pair for pair in pairs if name in (None, pair[1].name)]
    if not named:
        raise ArchitectureError(
            f"{', '.join(archs)}: no model {name!r} under [proof]",
            hint=f"there are {', '.join(model.name for _, model in pairs)}",
        )
    return named


def verify(arch: str, *, name: str | None = None, scratch: Path) -> tuple[ProofReport, ...]:
    """Prove a spec with its tiny models.

    Args:
        arch: Its name, or its file (*.toml).
        name: The only model to try; None for all.
        scratch: Folder that the models are written to, one below it each.

    Raises:
        ArchitectureError: no such spec or model.
    """
    return tuple(prove(m, arch, scratch / m.name) for _, m in chosen([arch], name=name))


def prove(
    model: TinyModel,
    arch: str,
    scratch: Path,
    *,
    only: Sequence[CheckName] = CHECKS,
    suspects: Sequence[str] = (),
    quick: bool = False,
) -> ProofReport:
    """Check one tiny model; the checks after "source" need a source.

    Args:
        model: The model.
        arch: The spec's name or file.
        scratch: Folder that the models are written to.
        only: The checks to make; "source" is always made.
        suspects: The axes that are tried alone where all of them together fail; empty for each.
        quick: Whether no check is made behind one that fails, and no class asked beforehand.
    """
    work = _Proof(model, arch, scratch, suspects, "never" if quick else "auto")
    checks: Mapping[CheckName, Callable[[], float | None]] = {
        "growth": work.growth,
        "round trip": work.round_trip,
        "permutation": work.permutation,
        "shrink": work.shrink,
        "promises": work.promises,
        "missing": work.missing,
    }
    results = [_check("source", work.build)]
    for name, check in checks.items():
        if results[0].passed and name in only and (results[-1].passed or not quick):
            results.append(_check(name, check))
    return ProofReport(model.name, tuple(results))


@final
class _Proof:
    """The checks of one model. Each gives the error it found, or raises with what is wrong."""

    def __init__(
        self,
        model: TinyModel,
        arch: str,
        scratch: Path,
        suspects: Sequence[str],
        class_check: ClassCheck,
    ) -> None:
        self._model, self._arch, self._scratch = model, arch, scratch
        self._suspects, self._class_check = suspects, class_check
        self._expected: Mapping[str, Tensor] = {}
        self._hidden: set[str] = set()

    def build(self) -> None:
        """The small model, and what it computes."""
        tiny_models.build(self._model, self._scratch / "source")
        self._expected = tiny_models.outputs(self._scratch / "source", self._model)

    def growth(self) -> float | None:
        """Every width twice as large."""
        return self._same(
            self._grown,
            lambda axes: self._source.decoalesce(axes=dict.fromkeys(axes, 2)),
            self._axes("width"),
        )

    def round_trip(self) -> float | None:
        """The grown files merged by the map that is saved with them."""
        if not self._axes("width"):
            return None  # They have none.
        grown = self._grown()
        self._save(grown, "grown")
        merged = self._open("grown").coalesce()
        self._save(merged, "merged")
        families = self._source.plan.model.families
        kept = {key for f in families if f.rule.kind != "drop" for key in f.members.values()}
        if kept != set(merged.keys()):
            raise PlanError(f"{some(sorted(kept ^ set(merged.keys())))}: not in both models")
        pairs = {key: (x, self._source.read(key)) for key, x in self._open("merged").tensors()}
        wrong = {
            k: comparison.relative(x, old)
            for k, (x, old) in pairs.items()
            if not torch.equal(x, old)
        }
        error = max(wrong.values(), default=0.0)
        if error > (_ROUNDING if self._rounds() else 0.0):
            raise _WrongError(error, f"{some(sorted(wrong))} differ from the source")
        if self._kept(merged.config) != self._kept(self._source.config):
            raise PlanError("the merged model has another config.json than the source")
        return error

    def _kept(self, config: Mapping[str, object] | None) -> dict[str, object]:
        """config.json without the fields that say a size in other words once it has changed."""
        kept = copy.deepcopy(dict(config or {}))
        for fields in self._source.plan.model.architecture.written.values():
            for field in fields:
                config_fields.delete_field(kept, field)
        return kept

    def permutation(self) -> float | None:
        """Every width, and the experts, in random order; hidden units with random signs."""
        return self._same(
            lambda: self._permuted(()),
            self._permuted,
            (*self._axes("width"), *self._axes("expert")),
        )

    def promises(self) -> float | None:
        """All other growth that says it is exact."""
        head_dim = 2 * self._source.sizes.get("head_dim", 0)
        asked: dict[str, dict[str, Any]] = {
            "experts": {"experts": 2},
            "head_dim": {"head_dim": head_dim},
            "untie": {**self._widths("stacked"), "untie": True},
        }
        for way in (
            (*layer_ways.WAYS, layer_ways.every_other_doubled) if self._axes("depth") else ()
        ):
            asked[f"new_layers {way.__name__}"] = {"axes": self._layers(way), "new_layers": "zero"}
        errors, wrong, axes = [0.0], [], dict[str, None]()
        for name, options in ((n, one) for n, many in asked.items() for one in self._granted(many)):
            try:
                error, (promise, allowed) = self._kept_promise(name, options)
            except PlanError as failure:
                wrong.append(str(failure))
                axes[name] = None
                continue
            errors.append(error)
            if not error <= allowed:
                wrong.append(f"{name}: {error:.1e}, though it is called {promise}")
                axes |= dict.fromkeys(self._breaking(name, options) or (name,))
        if wrong:
            raise _WrongError(max(errors), ", ".join(wrong), tuple(axes))
        return max(errors)

    def _granted(self, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A growth; where it is refused for one of several axes, that of each alone."""
        asked: Mapping[str, RequestLike] = options.get("axes", {})
        try:
            self._source.decoalesce(**options)
        except StreammapError:
            return [{**options, "axes": {axis: request}} for axis, request in asked.items()]
        return [options]

    def _kept_promise(
        self, name: str, options: Mapping[str, Any]
    ) -> tuple[float, tuple[Promise, float]]:
        """The error of a growth, and its promise with what that allows."""
        try:
            lazy = self._source.decoalesce(**options)
        except StreammapError:
            return 0.0, ("approximate", math.inf)  # A refusal promises nothing.
        promise = lazy.promise[0]
        allowed = _ALLOWED.get(promise)
        error = None if allowed is None else self._told_error(name, lazy)
        return error or 0.0, (promise, math.inf if allowed is None else allowed)

    def _breaking(self, name: str, options: Mapping[str, Any]) -> list[str]:
        """The axes whose growth alone breaks a promise, of a growth of several."""
        asked: Mapping[str, RequestLike] = options.get("axes", {})
        broken = []
        for axis, request in asked.items():
            error, (_, allowed) = self._kept_promise(name, {**options, "axes": {axis: request}})
            broken += [axis] * (not error <= allowed)
        return broken

    def missing(self) -> float | None:
        """Other depths of the model, from a config.json without the lists that loaders derive."""
        errors = [
            self._as_with_lists(name)
            for name, config in missing_lists.variants(self._source)
            if self._make_variant(name, config)
        ]
        return max(errors, default=None)

    def _make_variant(self, name: str, config: Mapping[str, object]) -> bool:
        """Write the model with another config.json that says the same; whether it is taken."""
        folder = self._scratch / name
        shutil.copytree(self._scratch / "source", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            found = tiny_models.outputs(folder, self._model)
        except Exception:
            if name == missing_lists.WITHOUT:
                raise
            return False
        if any(not torch.equal(x, self._expected[output]) for output, x in found.items()):
            raise PlanError(f"{name}: the spec derives the same lists, and its library others")
        return True

    def _as_with_lists(self, name: str) -> float:
        """The largest difference between results of the model with and without its lists."""
        some = self._layers(layer_ways.every_other_doubled)
        fewer = self._layers(layer_ways.all_but_one)
        asked: dict[str, Callable[[LazyCheckpoint], LazyCheckpoint]] = {
            "zero-initialised layers": lambda lazy: lazy.decoalesce(axes=some, new_layers="zero"),
            "copied layers": lambda lazy: lazy.decoalesce(axes=some),
            "layers left out": lambda lazy: lazy.coalesce(axes=fewer),
        }
        errors = [0.0]
        for what, make in asked.items():
            try:
                expected = self._run(make(self._source), "resized")
            except StreammapError:
                continue  # Refused with its lists, for its kinds of layers.
            found = self._run(make(self._open(name)), "resized")
            errors += (comparison.relative(x, expected[output]) for output, x in found.items())
            if max(errors) > 0.0:
                raise _WrongError(max(errors), f"{name}: {what} give another model")
        return max(errors)

    def shrink(self) -> float | None:
        """Twice as wide and deep, and half of that in other groups of widths."""
        deep, layers = self._deep()
        self._run(deep, "deep")
        small = self._open("deep").coalesce(**self._widths("adjacent"))
        self._run(small.coalesce(axes=layers) if layers else small, "small")
        return None

    def _deep(self) -> tuple[LazyCheckpoint, Mapping[str, RequestLike]]:
        """The model with twice the layers, and how: as its kinds of layers allow it."""
        grown = self._grown()
        if not self._axes("depth"):
            return grown, {}
        failures = []
        for way in layer_ways.DEEPER:
            try:
                return grown.decoalesce(axes=self._layers(way)), self._layers(way)
            except PlanError as failure:
                failures.append(told(failure))
        raise PlanError("; ".join(failures))

    def _layers(self, way: Way) -> dict[str, RequestLike]:
        return {axis: way(self._source.sizes[axis]) for axis in self._axes("depth")}

    def _rounds(self) -> bool:
        """Whether growing and merging rounds: gains of 1 + w, and factors such as sqrt(2)."""
        spec = self._source.plan.model.architecture
        has_offset = any(rule.norm is not None and rule.norm.offset for rule in spec.rules)
        return has_offset or bool(spec.forward_scale) or any(head.scale for head in spec.heads)

    @cached_property
    def _source(self) -> LazyCheckpoint:
        return self._open("source")

    def _axes(self, kind: AxisKind) -> tuple[str, ...]:
        axes, sizes = self._source.plan.model.architecture.axes, self._source.sizes
        names = [name for name, size in sizes.items() if size and axes[name].kind == kind]
        return tuple(name for name in names if name not in self._model.exempt)

    def _open(self, name: str) -> LazyCheckpoint:
        return api.open(self._scratch / name, arch=self._arch)

    def _grown(self) -> LazyCheckpoint:
        return self._source.decoalesce(**self._widths("stacked"))

    def _widths(self, grouping: Grouping) -> dict[str, Any]:
        """Twice every width, or half of it."""
        if self._model.exempt:
            return {"axes": dict.fromkeys(self._axes("width"), 2), "grouping": grouping}
        return {"width": 2, "grouping": grouping}

    def _permuted(self, only: tuple[str, ...]) -> LazyCheckpoint:
        model = self._source.plan.model
        chosen = [axis for axis in only or model.sizes if axis not in self._model.exempt]
        signed = any(units.takes_signs(model, axis) for axis in chosen)
        operator = Permute(seed=0, only=only, without=self._model.exempt, signed=signed)
        return self._source.apply(operator)

    def _save(self, lazy: LazyCheckpoint, name: str) -> None:
        folder = self._scratch / name
        lazy.save(folder, overwrite=True, fsync=False, class_check=self._class_check)

    def _run(self, lazy: LazyCheckpoint, name: str) -> dict[str, Tensor]:
        """What a resized model computes, through its files."""
        self._save(lazy, name)
        results = tiny_models.outputs(self._scratch / name, self._model)
        if results.keys() != self._expected.keys():
            raise PlanError(f"outputs are {sorted(results)}, expected {sorted(self._expected)}")
        wrong = [output for output, x in results.items() if not x.isfinite().all()]
        if wrong:
            raise PlanError(f"{', '.join(wrong)}: not finite")
        return results

    def _error(self, lazy: LazyCheckpoint) -> float | None:
        """How far a resized model's outputs are from the source's."""
        results = self._run(lazy, "resized")
        signed = any(step.options.get("signed", False) for step in lazy.plan.steps)
        errors = []
        for output, x in self._expected.items():
            if "logits" not in output or results[output].shape != x.shape:
                self._hidden.add(output)
            in_order = output not in self._hidden
            errors.append(
                comparison.difference(results[output], x, in_order=in_order, signed=signed)
            )
        return max(errors, default=None)

    def _same(
        self,
        whole: Callable[[], LazyCheckpoint],
        changed: Changed,
        axes: Sequence[str],
    ) -> float | None:
        """The error of a change of all axes; where it is too large, that of each axis is told."""
        try:
            error = self._error(whole())
        except Exception as failure:
            each, wrong = by_axis(changed, self._error, axes, self._suspects)
            raise _WrongError(None, f"{told(failure)}; {each}", wrong) from failure
        if error is not None and not error < TOLERANCE:
            raise _WrongError(error, *by_axis(changed, self._error, axes, self._suspects))
        return error

    def _told_error(self, name: str, lazy: LazyCheckpoint) -> float | None:
        try:
            return self._error(lazy)
        except Exception as failure:
            raise PlanError(f"{name}: {told(failure)}") from failure


class _WrongError(Exception):
    """A check that found what is wrong: a difference, and the axes that make it."""

    def __init__(self, error: float | None, message: str, axes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.error, self.axes = error, axes


def _check(name: CheckName, check: Callable[[], float | None]) -> Check:
    try:
        error = check()
    except _WrongError as found:
        return Check(name, False, found.error, str(found), found.axes)
    # Model code that gets a wrong shape raises whatever it likes; all of it is the spec's failure.
    except Exception as failure:
        return Check(name, passed=False, error=None, message=told(failure))
    return Check(name, passed=True, error=error, message="")
