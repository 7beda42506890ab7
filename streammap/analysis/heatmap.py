"""A picture of relative differences: layers from left to right, parameter groups as rows. SVG.

The scale is logarithmic, from the smallest to the largest difference, in whole decades. Grey is
equal bit by bit; red has NaN or Inf that the other lacks; hatched is in one of them only, or of
another shape; nothing is drawn where no tensor is. The number at the right is a row's largest;
cells have numbers where they are wide enough.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from streammap.analysis.difference import LAYER, Difference, TensorDifference
from streammap.architectures import key_pattern
from streammap.errors import OutputError

_STOPS = ("#fdf3d3", "#fbc78d", "#f4895f", "#d4466a", "#92277f", "#4a1079", "#140e36")
"""Light to dark, in equal steps of lightness as far as eyes go."""
_EQUAL, _ODD, _INK, _PALE, _HATCHED = "#e3e7ea", "#e00000", "#222", "#667", "url(#apart)"
_HATCHES = (
    '<defs><pattern id="apart" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="5" height="5" fill="white"/>'
    f'<path d="M 0 0 v 5" stroke="{_PALE}" stroke-width="2"/></pattern></defs>'
)
_ROW, _TOP, _SPAN = 20, 96, 860
_MIN_CELL, _MAX_CELL, _NUMBER_CELL = 6.0, 52.0, 36.0
_LETTER, _TITLE_LETTER = 6.7, 9.0
"""Width of a letter of 12 px, and of 14 px in bold, about."""
SUFFIX = ".svg"
_MAX_ROWS = 400


@dataclass(frozen=True, slots=True)
class _Row:
    """Tensors of one kind."""

    name: str
    cells: Mapping[int, "_Cell"]
    """Layer -> the tensor, the worst one where a layer has several; -1 for no layer."""

    @property
    def worst(self) -> "_Cell":
        """The worst of all."""
        return max(self.cells.values(), key=lambda cell: cell.badness)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One tensor."""

    key: str
    found: TensorDifference | None
    """None where the two can't be compared."""
    apart: str = ""
    """Why not."""

    @property
    def badness(self) -> tuple[float, ...]:
        """The larger, the worse; what can be compared counts first."""
        return (0.0,) if self.found is None else (1.0, *self.found.badness)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Decades from `low` to `high`."""

    low: int
    high: int

    def at(self, value: float) -> float:
        """0 to 1."""
        if value <= 0.0:
            return 0.0
        where = (math.log10(value) - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, where))

    def colour(self, value: float) -> str:
        """Its colour."""
        place = self.at(value) * (len(_STOPS) - 1)
        i = min(int(place), len(_STOPS) - 2)
        pairs = [(_STOPS[i][k : k + 2], _STOPS[i + 1][k : k + 2]) for k in (1, 3, 5)]
        mixed = (int(a, 16) + (int(b, 16) - int(a, 16)) * (place - i) for a, b in pairs)
        return "#" + "".join(f"{round(x):02x}" for x in mixed)


def check_path(path: Path, *, overwrite: bool) -> None:
    """Refuse a place that no picture can be written to, before anything is read.

    Raises:
        OutputError: another ending than .svg, no folder, or something that exists.
    """
    if path.suffix.lower() != SUFFIX:
        raise OutputError(
            f"{path}: pictures are SVG, the ending is {path.suffix or 'missing'}",
            hint=f"give --plot {path.with_suffix(SUFFIX) if path.name else 'diff.svg'}; browsers "
            "and rsvg-convert make a PNG of it",
        )
    if not path.parent.is_dir():
        raise OutputError(f"{path}: {path.parent} is no folder", hint="make it, or check the path")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(
            f"{path}: already exists", hint="name another file, or replace it: --overwrite"
        )


def save(difference: Difference, path: Path) -> None:
    """Write the picture.

    Raises:
        OutputError: it can't be written there.
    """
    try:
        path.write_text(svg(difference))
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error


def svg(difference: Difference) -> str:
    """The picture's text."""
    rows, prefix = _rows(difference)
    layers = sorted({layer for row in rows for layer in row.cells if layer >= 0})
    cell = max(_MIN_CELL, min(_MAX_CELL, _SPAN / max(1, len(layers))))
    left = 24 + _LETTER * max((len(row.name) for row in rows), default=10)
    right = left + cell * max(1, len(layers))
    values = [t.relative for t in difference.tensors if t.relative and math.isfinite(t.relative)]
    scale = _scale(values)
    layered = sum(max(row.cells) >= 0 for row in rows)
    bottom = _TOP + _ROW * len(rows) + (34 if layered and layered < len(rows) else 16)
    width = max(right + 90, left + 540, 640.0)
    size = f'width="{width:.0f}" height="{bottom + 62:.0f}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<style>text {{ font: 12px sans-serif; fill: {_INK} }} .s {{ font-size: 10px }}",
        f".p {{ fill: {_PALE} }} .t {{ font: bold 14px sans-serif }}</style>",
        _HATCHES,
        '<rect width="100%" height="100%" fill="white"/>',
        *_title(difference, prefix, width),
    ]
    lines += _columns(layers, left, cell)
    y = float(_TOP)
    for i, row in enumerate(rows):
        if i == layered and layered:
            y += 18
        lines += _row(row, y, left, cell, layers, scale, right)
        y += _ROW
    lines += _legend(left, bottom + 8, scale)
    return "\n".join([*lines, "</svg>", ""])


def _title(difference: Difference, prefix: str, width: float) -> Iterator[str]:
    unequal = len(difference.tensors) - difference.n_equal
    letters = int((width - 32) / _TITLE_LETTER)
    a, b = (escape(name) for name in _shortened(difference.names, letters - len(" and ")))
    yield f'<text class="t" x="16" y="26">{a} and {b}</text>'
    subtitle = f"||a - b|| / ||a|| of each tensor: {unequal} differ, {difference.n_equal} are equal"
    more = len(difference.shapes) + len(difference.only[0]) + len(difference.only[1])
    subtitle += f", {more} can't be compared" if more else ""
    yield f'<text class="p" x="16" y="46">{subtitle}</text>'
    if prefix:
        (name,) = _shortened((prefix.rstrip("."),), int((width - 180) / _LETTER))
        whose = escape(name)
        yield f'<text class="p" x="16" y="64">rows are tensors of {whose}</text>'


def _shortened(names: Sequence[str], letters: int) -> list[str]:
    """Names that fit into so many letters together: of long ones the end, which tells most."""
    left, shown = letters, dict.fromkeys(names, "")
    for n, name in enumerate(sorted(shown, key=len)):
        most = left // (len(shown) - n)
        shown[name] = name if len(name) <= most else f"...{name[len(name) - most + 3 :]}"
        left -= len(shown[name])
    return [shown[name] for name in names]


def _columns(layers: Sequence[int], left: float, cell: float) -> Iterator[str]:
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * cell >= 18 or n == 1000)
    for i, layer in enumerate(layers):
        if layer % step == 0:
            x = left + cell * (i + 0.5)
            where = f'x="{x:.1f}" y="{_TOP - 6}"'
            yield f'<text class="s p" {where} text-anchor="middle">{layer}</text>'
    if layers:
        x = left - 8
        yield f'<text class="s p" x="{x:.1f}" y="{_TOP - 6}" text-anchor="end">layer</text>'
        x = left + cell * len(layers) + 8
        yield f'<text class="s p" x="{x:.1f}" y="{_TOP - 6}">largest</text>'


def _row(
    row: _Row,
    y: float,
    left: float,
    cell: float,
    layers: Sequence[int],
    scale: _Scale,
    right: float,
) -> Iterator[str]:
    yield f'<text x="{left - 8:.1f}" y="{y + 14:.1f}" text-anchor="end">{escape(row.name)}</text>'
    numbered = cell >= _NUMBER_CELL
    for layer, held in sorted(row.cells.items()):
        x = left + cell * (layers.index(layer) if layer >= 0 else 0)
        wide = cell if layer >= 0 else max(cell, 14.0)
        tensor, fill = held.found, _fill(held, scale)
        gap = 1 if cell > 10 else 0
        yield (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - gap:.1f}" height="{_ROW - 1}" '
            f'fill="{fill}"><title>{escape(held.key)}: {escape(_value(held))}</title></rect>'
        )
        if numbered and layer >= 0 and tensor is not None:
            dark = tensor.n_odd or scale.at(tensor.relative or 0.0) > 0.45
            ink = "white" if dark and not tensor.is_equal else _INK
            yield (
                f'<text class="s" x="{x + wide / 2:.1f}" y="{y + 13:.1f}" text-anchor="middle" '
                f'style="fill: {ink}">{_value(held)}</text>'
            )
    x = right + 8 if max(row.cells) >= 0 else left + max(cell, 14.0) + 8
    if row.worst.found is not None:
        yield f'<text class="s" x="{x:.1f}" y="{y + 13:.1f}">{_value(row.worst)}</text>'


def _legend(left: float, y: float, scale: _Scale) -> Iterator[str]:
    wide = 240
    stops = "".join(
        f'<stop offset="{i / (len(_STOPS) - 1):.3f}" stop-color="{stop}"/>'
        for i, stop in enumerate(_STOPS)
    )
    yield f'<defs><linearGradient id="scale">{stops}</linearGradient></defs>'
    yield f'<rect x="{left:.1f}" y="{y}" width="{wide}" height="12" fill="url(#scale)"/>'
    decades = scale.high - scale.low
    for decade in range(scale.low, scale.high + 1, max(1, -(-decades // 6))):
        x = left + wide * (decade - scale.low) / decades
        yield f'<path d="M {x:.1f} {y + 12} v 4" stroke="{_PALE}"/>'
        yield f'<text class="s" x="{x:.1f}" y="{y + 28}" text-anchor="middle">1e{decade}</text>'
    for x, fill, label in (
        (left + wide + 30, _EQUAL, "equal"),
        (left + wide + 90, _ODD, "NaN or Inf in one"),
        (left + wide + 205, _HATCHED, "not in both"),
    ):
        yield f'<rect x="{x:.1f}" y="{y}" width="12" height="12" fill="{fill}"/>'
        yield f'<text class="s" x="{x + 17:.1f}" y="{y + 10}">{label}</text>'


def _fill(cell: _Cell, scale: _Scale) -> str:
    tensor = cell.found
    if tensor is None:
        return _HATCHED
    if tensor.n_odd:
        return _ODD
    if tensor.is_equal:
        return _EQUAL
    return scale.colour(tensor.relative if tensor.relative is not None else math.inf)


def _value(cell: _Cell) -> str:
    tensor = cell.found
    if tensor is None:
        return cell.apart
    if tensor.n_odd:
        return "NaN"
    if tensor.is_equal:
        return "="
    if tensor.relative is None:
        return "differs"
    return f"{tensor.relative:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _scale(values: Sequence[float]) -> _Scale:
    if not values:
        return _Scale(-6, 0)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    return _Scale(max(low, high - 12), high)


def _cells(difference: Difference) -> Iterator[_Cell]:
    """All tensors of both."""
    for tensor in difference.tensors:
        yield _Cell(tensor.key, tensor)
    for key, (a, b) in difference.shapes.items():
        yield _Cell(key, None, f"shape {list(a)} and {list(b)}")
    for name, keys in zip(difference.names, difference.only, strict=True):
        for key in keys:
            yield _Cell(key, None, f"only in {name}")


def _rows(difference: Difference) -> tuple[list[_Row], str]:
    """Rows of layers first, in the order of keys, and what their names begin with."""
    cells_of: dict[str, dict[int, _Cell]] = {}
    for cell in sorted(_cells(difference), key=lambda cell: key_pattern.natural(cell.key)):
        layer = LAYER.search(cell.key)
        name = cell.key
        if layer is not None:
            rest = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", cell.key[layer.end() :])
            name = f"{cell.key[: layer.start()]}*{rest}"
        cells = cells_of.setdefault(name, {})
        number = -1 if layer is None else int(layer[0])
        if number not in cells or cell.badness > cells[number].badness:
            cells[number] = cell
    layered = [name for name, cells in cells_of.items() if max(cells) >= 0]
    prefixes = {name[: name.index("*") + 1] + "." for name in layered}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    rows = [_Row(name.removeprefix(prefix), cells_of[name]) for name in layered]
    rows += [_Row(name, cells) for name, cells in cells_of.items() if name not in set(layered)]
    return rows[:_MAX_ROWS], prefix
