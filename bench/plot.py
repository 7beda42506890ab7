"""A bar chart as an SVG file, by hand; prints nothing, used by bench.memory --plot."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_LEFT, _WIDTH, _ROW, _TOP = 330, 420, 20, 44


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, and a mark beside it."""

    name: str
    value: float
    mark: float


def svg_path(text: str) -> Path:
    """Where a picture goes, for argparse: only SVG is written."""
    path = Path(text)
    if path.suffix.lower() != ".svg" or not path.parent.is_dir():
        raise ArgumentTypeError(f"{text}: expected FILE.svg in a folder that exists")
    return path


def svg(title: str, bars: Sequence[Bar]) -> str:
    """The chart's text."""
    top = max(1.0, *(max(bar.value, bar.mark) for bar in bars)) * 1.1
    height = _TOP + _ROW * len(bars) + 30
    width = _LEFT + _WIDTH + 70
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if top / n <= 10 or n == 500)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        "<style>text { font: 12px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20">{escape(title)}</text>',
    ]
    for tick in range(0, int(top) + 1, step):
        x = _LEFT + _WIDTH * tick / top
        lines += [
            f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - 24}" stroke="#ddd"/>',
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick}</text>',
        ]
    for i, bar in enumerate(bars):
        y, mark = _TOP + _ROW * i, _LEFT + _WIDTH * bar.mark / top
        wide = max(0.0, _WIDTH * bar.value / top)
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{wide:.1f}" height="14" fill="#4a7fb5"/>',
            f'<path d="M {mark:.1f} {y - 2} v 18" stroke="#b5352a" stroke-width="2"/>',
            f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 11}">{bar.value:.0f} / {bar.mark:.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
