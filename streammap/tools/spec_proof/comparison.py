"""How far apart the outputs of two models are."""

import math

from torch import Tensor, equal

from streammap.errors import PlanError

TOLERANCE = 1e-9
"""Largest relative difference of outputs that are called the same."""
_MARK = 1e30
"""Logits of this size stand for tokens that a model never gives: no error is relative to them."""


def difference(found: Tensor, expected: Tensor, *, in_order: bool, signed: bool = False) -> float:
    """How far an output is from the expected one, relative to its largest number.

    Args:
        in_order: Whether the last dimension is one that no axis has. Where it is not, its numbers
            are sorted, and the expected ones repeated.
        signed: Whether its units may be negated: then magnitudes are sorted.

    Raises:
        PlanError: another shape.
    """
    if not in_order and found.shape[:-1] == expected.shape[:-1]:
        n_copies = found.shape[-1] // expected.shape[-1]
        if signed:
            found, expected = found.abs(), expected.abs()
        expected = expected.sort().values.repeat_interleave(n_copies, dim=-1)
        found = found.sort().values
    if found.shape != expected.shape:
        raise PlanError(f"shape {list(found.shape)} of outputs, expected {list(expected.shape)}")
    return relative(found, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference / the largest number."""
    if not found.is_floating_point():
        return float(not equal(found, expected))
    marks = expected.abs() >= _MARK
    if not equal(found[marks], expected[marks]):
        return math.inf
    found, expected = found[~marks], expected[~marks]
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
