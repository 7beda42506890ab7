"""What tells the copies of one result apart: noise in what reads them, or shares that add up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from streammap.architectures.model import Model, TiedHead
from streammap.errors import PlanError
from streammap.planning import graph
from streammap.planning.copies.noising import Grown, NoiseRequest, Noising
from streammap.planning.derived import shared_out
from streammap.planning.derived.shared_out import SharedOut
from streammap.planning.dim_maps import DimMaps
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap

_NEAR_ONE = 1e-9


@final
@dataclass(frozen=True, slots=True)
class ApartRequest:
    """What is asked for."""

    noise: NoiseRequest | None = None
    adds_up: bool = False
    """Whether shares of copies are stored as parts that add up, where the dtype has these."""


@final
class Apart:
    """Changes tensors of one result."""

    def __init__(
        self, model: Model, asked: ApartRequest, hidden: Sequence[str], tied: Sequence[TiedHead]
    ) -> None:
        """Nothing is changed yet; the arguments are those of Noising."""
        self._adds_up = asked.adds_up
        self._noising = None
        if asked.noise is not None:
            self._noising = Noising(model, asked.noise, hidden, tied)
        self._whole: dict[tuple[int, str], tuple[BlockMap, BlockMap | None]] = {}
        """By identity, which is the map's as long as it is kept."""

    def made(self, form: LinearForm, grown: Grown, here: DimMaps) -> LinearForm:
        """A tensor of the result, as it is to be.

        Args:
            form: The tensor with copies and shares alone.
            here: The maps of its layer.
        """
        if self._noising is not None:
            return self._noising.added(form, grown, here)
        # Less its offset, a gain that is stored in parts would be rounded again.
        is_parted = self._adds_up and not grown.offset
        return self._shared_out(form, grown) if is_parted else form

    def notes(self) -> list[str]:
        """What a user might not expect.

        Raises:
            PlanError: noise was asked for, and nothing could take it.
        """
        if self._noising is None:
            return []
        if self._noising.is_in_vain:
            raise PlanError(
                "--noise, but no weight reads copies of units",
                hint="leave it out; it is for hidden units, heads and MLP neurons that are copied, "
                "and for experts whose copies keep the function",
            )
        return self._noising.notes()

    def _shared_out(self, form: LinearForm, grown: Grown) -> LinearForm:
        """The tensor with parts in the place of shares, where shares would be rounded."""
        dtype = form.spec.dtype
        found = [
            (d, m, whole)
            for d, m in enumerate(grown.dims)
            if isinstance(m, BlockMap) and (whole := self._copying(m, dtype)) is not None
        ]
        if len(found) != 1:
            return form
        ((d, m, whole),) = found
        dims: list[AxisMap | None] = [*grown.dims]
        dims[d] = whole
        copied = graph.scale(graph.map_dims(grown.before, dims), grown.factor)
        return graph.derive(SharedOut(copied, d, m), dtype=dtype)

    def _copying(self, m: BlockMap, dtype: str) -> BlockMap | None:
        """The map of the same copies without shares; None where these are not to be parts."""
        if (id(m), dtype) not in self._whole:
            whole = None
            if m.longest == 1 and _is_parted(m, dtype):
                rows = tuple(tuple((j, 1.0) for j, _ in row) for row in m.rows)
                whole = BlockMap(rows, m.n_in_blocks, m.block)
            self._whole[id(m), dtype] = m, whole
        return self._whole[id(m), dtype][1]


def _is_parted(m: BlockMap, dtype: str) -> bool:
    """Whether a map has shares that would be rounded, and that parts can stand for."""
    vectors = shared_out.shares_of(m)
    are_shares = all(abs(math.fsum(one) - 1.0) < _NEAR_ONE for one in vectors)
    is_rounded = any(math.frexp(share)[0] != 0.5 for one in vectors for share in one)
    return is_rounded and are_shares and all(shared_out.adds_up(one, dtype) for one in vectors)
