"""Curves over the cost of training: as a table, and as an SVG file; used by bench.vcycle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 360, 60, 40
_COLOURS = ("#4a7fb5", "#b5352a", "#3a8a4d", "#b58a1e", "#7a4fa0")


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss over cost."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(cost, loss), in the order of training."""
    seconds: float


def cost_to_reach(curve: Curve, loss: float) -> float | None:
    """What it costs to come to a loss, between points linearly; None where it never does."""
    pairs = list(zip(curve.points, curve.points[1:], strict=False))
    for (x0, y0), (x1, y1) in pairs:
        if y1 <= loss < y0:
            return x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return None


def as_text(curves: Sequence[Curve]) -> str:
    """Every point, a curve a block."""
    return "\n".join(
        f"{curve.name:18s} " + " ".join(f"{x:.0f}:{y:.2f}" for x, y in curve.points)
        for curve in curves
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, four to eight of them: steps of 1, 2 or 5 x 10^k."""
    decade = 10.0 ** math.floor(math.log10((high - low) / 8))
    step = next(decade * n for n in (1, 2, 5, 10) if (high - low) / (decade * n) <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def svg(title: str, curves: Sequence[Curve]) -> str:
    """The picture's text."""
    right = max(x for curve in curves for x, _ in curve.points) or 1.0
    losses = [y for curve in curves for _, y in curve.points[1:]]
    low, high = min(losses) - 0.05, max(losses) + 0.05

    def at(x: float, y: float) -> tuple[float, float]:
        down = (high - min(max(y, low), high)) / (high - low)
        return _LEFT + _WIDTH * x / right, _TOP + _HEIGHT * down

    width, height = _LEFT + _WIDTH + 30, _TOP + _HEIGHT + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        "<style>text { font: 12px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20">{escape(title)}</text>',
    ]
    for y in ticks(low, high):
        _, ty = at(0, y)
        lines += [
            f'<path d="M {_LEFT} {ty:.1f} h {_WIDTH}" stroke="#ddd"/>',
            f'<text x="{_LEFT - 8}" y="{ty + 4:.1f}" text-anchor="end">{y:.4g}</text>',
        ]
    for x in ticks(0.0, right):
        tx, _ = at(x, low)
        lines.append(
            f'<text x="{tx:.1f}" y="{_TOP + _HEIGHT + 20}" text-anchor="middle">{x:.4g}</text>'
        )
    for i, curve in enumerate(curves):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " L ".join(f"{x:.1f} {y:.1f}" for x, y in (at(*p) for p in curve.points))
        x, y = _LEFT + _WIDTH - 150, _TOP + 18 + 18 * i
        lines += [
            f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x}" y="{y}" fill="{colour}">{escape(curve.name)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
