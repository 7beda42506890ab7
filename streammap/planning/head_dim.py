"""Head-size growth with rotary positions: wider heads that attend as before.

New pairs of rotary dimensions are zero. Old pair i keeps its place and, with

    theta' = theta ** (d' / d)        its frequency theta^(-2i/d)
    q * sqrt(d' / d)                  the scale 1/sqrt(d) of scores

so that attention is the same. A norm over the head (q_norm, k_norm) sees the zero dimensions: its
gain takes sqrt(d / d') more. Exact for default, linear, llama3 and yarn frequencies.

Source: Gesmundo & Maile, arXiv:2308.06103 (scale); the rule for theta by equating frequencies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streammap.architectures.config_fields import field_value, meant
from streammap.architectures.key_pattern import KeyPattern, first_match
from streammap.architectures.model import Model
from streammap.architectures.schema import Rope
from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.compensation import FIXED_EPS, Compensation, eps_error, eps_words
from streammap.planning.maps import BlockMap
from streammap.planning.plan import STAY_ZERO, Promise
from streammap.planning.requests import MAX_PARTS

_EXACT_TYPES = ("default", "linear", "llama3", "yarn")
_INSTEAD = "grow the number of heads instead: --heads"


@dataclass(frozen=True, slots=True)
class HeadSize:
    """A growth of the head size, or the way back."""

    axis: str
    map: BlockMap
    """Channels of a head of the result from those of the source."""
    rope: Rope
    theta: tuple[tuple[str, float], ...]
    """Config field -> new value."""
    norm_eps: float | None
    """The epsilon of norms over a head; None where there are none."""
    caveat: str | None
    """Why the growth is not exact in this architecture; None where it is."""

    @staticmethod
    def grown(model: Model, size: int) -> "HeadSize":
        """The growth of a model's heads to `size`.

        Raises:
            PlanError: this architecture's positions don't allow it.
        """
        axis, rope = _rope(model)
        old = model.sizes[axis]
        if size > MAX_PARTS:
            raise PlanError(
                f"{axis}: from {old} to {size}, at most {MAX_PARTS}", hint="ask for less"
            )
        if old < 1 or size <= old or size % 2 or old % 2:
            raise PlanError(
                f"{axis}: from {old} to {size}, expected an even size above {old}",
                hint=f"take {2 * old}, or another even number above {old}",
            )
        return HeadSize.mapped(model, _map(old, size, rope.layout))

    @staticmethod
    def mapped(model: Model, m: BlockMap) -> "HeadSize":
        """The change of a model's heads by a map: such a growth, or the way back from it.

        Raises:
            PlanError: this architecture's positions don't allow it.
        """
        axis, rope = _rope(model)
        # Where only a part of the head rotates, the channels after it would move; where frequencies
        # follow from more than theta (dynamic, longrope), no new theta gives the old ones back.
        partial = field_value(model.config, "partial_rotary_factor")
        if isinstance(partial, float) and partial < 1:
            raise PlanError(
                f"partial_rotary_factor {partial}: only heads that rotate as a whole can grow",
                hint=_INSTEAD,
            )
        odd = (kind for kind in _rope_types(model) if kind not in _EXACT_TYPES)
        if kind := next(odd, None):
            raise PlanError(
                f"rope type {kind!r}: its frequencies don't follow from theta alone",
                hint=f"head-size growth is for {', '.join(_EXACT_TYPES)}",
            )
        theta = [
            (f, _theta(f, value, m.n_out / m.n_in))
            for f in rope.theta
            if isinstance(value := field_value(model.config, f), int | float)
        ]
        if not theta:
            raise PlanError(
                f"config.json: no {' or '.join(rope.theta)}", hint="write the rope theta out"
            )
        # What scales the scores: the gain of a norm over the head, else the query projection, which
        # a fused qkv tensor does not have on its own.
        keys = [key for family in model.families for key in family.members.values()]
        eps = _eps(model, (*rope.query_norm, *rope.key_norm))
        if eps is None and not any(first_match(rope.query, key) is not None for key in keys):
            raise PlanError(
                f"{model.name}: the queries have no tensor of their own here, which could be "
                "scaled",
                hint=_INSTEAD,
            )
        caveat = model.architecture.caveats.get(axis)
        return HeadSize(axis, m, rope, tuple(theta), eps, caveat)

    @property
    def merging(self) -> BlockMap:
        """The map that leads back from a growth."""
        back = maps.transposed(self.map)
        assert isinstance(back, BlockMap)
        return back

    @property
    def size(self) -> int:
        """The new size of a head."""
        return self.map.n_out

    @property
    def notes(self) -> tuple[str, ...]:
        """What training does to the channels of a growth."""
        n_new = self.size - self.map.n_in
        told = f"{n_new} of {self.size} channels of a head are new, zero at first"
        return (f"{told}; {STAY_ZERO}",) if n_new > 0 else ()

    @property
    def promise(self) -> tuple[Promise, str]:
        """The guarantee of the growth, with the reason."""
        if self.size < self.map.n_in:
            dropped = f"{self.map.n_in - self.size} of {self.map.n_in} channels of a head"
            return "approximate", f"{dropped} are dropped"
        if self.caveat is not None:
            return "approximate", f"{self.axis}: {self.caveat}"
        if self.norm_eps is not None:
            error = eps_words(eps_error(self.norm_eps, self.size / self.map.n_in))
            reason = f"{self.axis}: norms over a head share their epsilon, {error}"
            return "exact up to eps", reason
        return "exact", f"{self.axis}: new rotary pairs are zero, theta and scores follow"

    def added_to(self, other: Compensation) -> Compensation:
        """The compensations of other axes and this one."""
        ratio = self.size / self.map.n_in
        factors = list(other.factors)
        # Scores are divided by sqrt(d') now, not by sqrt(d): the queries make up for it.
        scale = math.sqrt(ratio) if self.rope.scores == "head_dim" else 1.0
        if self.norm_eps is not None:
            # The norm undoes any factor on what it reads, so that gains take it. It divides by the
            # root of a mean over d' channels of which d are not zero: too little by sqrt(d / d').
            factors.append((self.rope.query_norm, scale / math.sqrt(ratio)))
            factors.append((self.rope.key_norm, 1.0 / math.sqrt(ratio)))
        else:
            factors.append((self.rope.query, scale))
        return replace(
            other,
            pairs={**other.pairs, self.axis: maps.pair_of(self.map)},
            factors=tuple(factors),
            fields={**other.fields, **dict(self.theta)},
        )


def _rope(model: Model) -> tuple[str, Rope]:
    """The axis of the head size, and its rotary positions."""
    if not model.architecture.rope:
        raise PlanError(
            f"{model.name}: the head size can't grow, its heads don't rotate as a whole",
            hint=_INSTEAD,
        )
    axis, rope = next(iter(model.architecture.rope.items()))
    if "." in axis:
        raise PlanError(
            f"{model.name}: the head size of an included model can't grow", hint=_INSTEAD
        )
    return axis, rope


def _eps(model: Model, patterns: Sequence[KeyPattern]) -> float | None:
    """The epsilon of the norms that some keys belong to; None where none is there."""
    for family in model.families:
        if any(first_match(patterns, key) is not None for key in family.members.values()):
            fields = family.rule.norm.eps if family.rule.norm is not None else ()
            values = [v for f in fields if isinstance(v := meant(model.config, f), float)]
            return max(values, default=FIXED_EPS)
    return None


def _theta(field: str, value: float, ratio: float) -> float:
    """The rope theta with which old frequencies keep their values."""
    try:
        if value > 0 and math.isfinite(theta := math.pow(value, ratio)):
            # Back to the number that was written by hand, if it was one.
            return theta if ratio > 1 else float(f"{theta:.14g}")
    except OverflowError:
        pass
    raise PlanError(
        f"config.json: {field} is {value}, to the power of {ratio:g} it is not a finite number",
        hint="is this config.json the checkpoint's own?",
    )


def _rope_types(model: Model) -> Iterator[str]:
    """How frequencies follow from theta: of all layers, or of each kind of them."""
    for name in ("rope_parameters", "rope_scaling"):
        table = field_value(model.config, name)
        if isinstance(table, dict):
            inner = [kind for kind in table.values() if isinstance(kind, dict)]
            yield from map(_rope_type, inner or [table])
            return


def _rope_type(table: Mapping[str, object]) -> str:
    if "mrope_section" in table:
        return "mrope"
    return str(table.get("rope_type", table.get("type", "default")))


def _map(old: int, new: int, layout: str) -> BlockMap:
    """Old channels at the places where their pairs rotate by the old angles, the rest zero."""
    rows: list[tuple[tuple[int, float], ...]] = [()] * new
    for i in range(old // 2):
        places = (
            ((i, i), (i + old // 2, i + new // 2))
            if layout == "half"
            else ((2 * i, 2 * i), (2 * i + 1, 2 * i + 1))
        )
        for source, target in places:
            rows[target] = ((source, 1.0),)
    return BlockMap(tuple(rows), old)
