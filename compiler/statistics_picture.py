"""Heat maps of layers and bands, and of layers and heads, as an SVG file, written without any library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from keysieve.compiler.shade import shade

LEFT, TOP, RIGHT, BOTTOM = 60, 92, 130, 60
CELL_HEIGHT = 14
MAP_WIDTH = 512
TICKS = 8  # labels along the bands, at most
LEGEND_WIDTH, LEGEND_STEPS = 160, 64
HEADS_LEFT, HEADS_WIDTH, HEAD_CELL = 70, 256, 32  # of the map of heads: a column before it, and the most it takes
WIDEST = 8.0  # share of the darkest colour; its inverse has the lightest, 1 the middle


@dataclass(frozen=True)
class Row:
    """One layer: R of every band from 0 to 1, of all, drift and the gates' correlation as text, shares of its heads."""

    layer: str
    bands: Sequence[float]
    resultant: str
    drift: str
    gate: str = ""
    shares: Sequence[float] = ()


def picture(title: str, subtitle: str, rows: Sequence[Row], shares: str = "") -> str:
    """The SVG text: one line of cells a layer, R and drift of the layer beside it, axes, and a legend from 0 to 1.

    shares: what the map of the heads' shares is called, which comes beside it with the gates' correlation; "" for none.
    Layers may differ in the number of bands and heads; one without bands shows an empty line.
    """
    bands = max((len(row.bands) for row in rows), default=0)
    cell = MAP_WIDTH / max(bands, 1)
    height = TOP + CELL_HEIGHT * len(rows) + BOTTOM
    beside, width = _shares(LEFT + MAP_WIDTH + RIGHT, rows, shares)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 22, title, size=15),
        _text(LEFT, 40, subtitle),
        _text(LEFT - 8, TOP - 8, "layer", anchor="end"),
        _text(LEFT + MAP_WIDTH + 12, TOP - 8, "R"),
        _text(LEFT + MAP_WIDTH + 62, TOP - 8, "drift"),
    ]
    for number, row in enumerate(rows):
        y = TOP + CELL_HEIGHT * number
        parts.append(_text(LEFT - 8, y + 11, row.layer, anchor="end"))
        for band, value in enumerate(row.bands):
            said = f"layer {row.layer}, band {band}: R {value:.3f}"
            parts.append(_cell("cell", LEFT + band * cell, y, cell, value, said))
        parts.append(_text(LEFT + MAP_WIDTH + 12, y + 11, row.resultant))
        parts.append(_text(LEFT + MAP_WIDTH + 62, y + 11, row.drift))
    bottom = TOP + CELL_HEIGHT * len(rows)
    parts += _ticks(LEFT, bottom, cell, bands)
    parts.append(_text(LEFT + MAP_WIDTH / 2, bottom + 32, "band (0 turns fastest)", anchor="middle"))
    ends = (("0", 0.0), ("0.5", 0.5), ("1", 1.0))
    parts += [*_legend(LEFT + MAP_WIDTH - LEGEND_WIDTH, "R", ends), *beside, "</svg>"]
    return "\n".join(parts) + "\n"


def _shares(left: float, rows: Sequence[Row], name: str) -> tuple[list[str], float]:
    """The map of layers and heads with the gates' correlation before it, and where it ends."""
    heads = max((len(row.shares) for row in rows), default=0)
    if not (heads or any(row.gate for row in rows)):
        return [], left
    parts, cells = [_text(left, TOP - 8, "gate r")], left + HEADS_LEFT
    cell = min(HEAD_CELL, HEADS_WIDTH / max(heads, 1))
    for number, row in enumerate(rows):
        y = TOP + CELL_HEIGHT * number
        parts.append(_text(left, y + 11, row.gate))
        for head, share in enumerate(row.shares):
            said = f"layer {row.layer}, KV head {head}: share {share:.2f}"
            value = (math.log(max(share, 1 / WIDEST), WIDEST) + 1) / 2
            parts.append(_cell("share", cells + head * cell, y, cell, value, said))
    if not heads:
        return parts, cells
    bottom = TOP + CELL_HEIGHT * len(rows)
    parts += _ticks(cells, bottom, cell, heads)
    parts += [_text(cells, bottom + 32, "KV head"), _text(cells, TOP - 8, name)]
    ends = ((f"1/{WIDEST:g}", 0.0), ("1", 0.5), (f"{WIDEST:g}", 1.0))
    parts += _legend(cells, "share", ends)
    return parts, cells + max(heads * cell, LEGEND_WIDTH) + 40


def _ticks(left: float, bottom: float, cell: float, count: int) -> list[str]:
    """Some of the numbers of `count` cells, below them."""
    numbers = range(0, count, max(1, -(-count // TICKS)))
    return [_text(left + (number + 0.5) * cell, bottom + 14, str(number), anchor="middle") for number in numbers]


def _cell(kind: str, x: float, y: float, width: float, value: float, said: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{CELL_HEIGHT}" '
        f'fill="{shade(value)}"><title>{escape(said)}</title></rect>'
    )


def _legend(left: float, name: str, ends: Sequence[tuple[str, float]]) -> list[str]:
    top, step = 50, LEGEND_WIDTH / LEGEND_STEPS
    parts = [
        f'<rect x="{left + step * n:.2f}" y="{top}" width="{step + 0.3:.2f}" height="9" '
        f'fill="{shade((n + 0.5) / LEGEND_STEPS)}"/>'
        for n in range(LEGEND_STEPS)
    ]
    marks = [_text(left + place * LEGEND_WIDTH, top + 20, label, anchor="middle") for label, place in ends]
    return [*parts, *marks, _text(left - 12, top + 9, name, anchor="end")]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
