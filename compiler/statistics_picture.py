"""A heat map of layers and bands as an SVG file, written without any library."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

Row = tuple[str, Sequence[float], str, str]  # layer, values from 0 to 1 (one a band), R, drift

LEFT, TOP, RIGHT, BOTTOM = 60, 80, 130, 60
CELL_HEIGHT = 14
MAP_WIDTH = 512
TICKS = 8  # labels along the bands, at most
LEGEND_STEPS = 64
COLOURS = ((253, 231, 204), (214, 96, 110), (46, 20, 84))  # of 0, 0.5 and 1: light to dark, so also without colour


def picture(title: str, subtitle: str, rows: Sequence[Row]) -> str:
    """The SVG text: one line of cells a layer, R and drift of the layer beside it, axes, and a legend from 0 to 1.

    Layers may differ in the number of bands; one without bands shows an empty line.
    """
    bands = max((len(values) for _, values, _, _ in rows), default=0)
    cell = MAP_WIDTH / max(bands, 1)
    height = TOP + CELL_HEIGHT * len(rows) + BOTTOM
    width = LEFT + MAP_WIDTH + RIGHT
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
    for number, (layer, values, resultant, drift) in enumerate(rows):
        y = TOP + CELL_HEIGHT * number
        parts.append(_text(LEFT - 8, y + 11, layer, anchor="end"))
        for band, value in enumerate(values):
            parts.append(
                f'<rect class="cell" x="{LEFT + band * cell:.2f}" y="{y}" width="{cell:.2f}" height="{CELL_HEIGHT}" '
                f'fill="{_colour(value)}"><title>layer {escape(layer)}, band {band}: R {value:.3f}</title></rect>'
            )
        parts.append(_text(LEFT + MAP_WIDTH + 12, y + 11, resultant))
        parts.append(_text(LEFT + MAP_WIDTH + 62, y + 11, drift))
    bottom = TOP + CELL_HEIGHT * len(rows)
    step = max(1, -(-bands // TICKS))
    for band in range(0, bands, step):
        parts.append(_text(LEFT + (band + 0.5) * cell, bottom + 14, str(band), anchor="middle"))
    parts.append(_text(LEFT + MAP_WIDTH / 2, bottom + 32, "band (0 turns fastest)", anchor="middle"))
    parts += [*_legend(), "</svg>"]
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    left, top, width = LEFT + MAP_WIDTH - 160, 50, 160
    step = width / LEGEND_STEPS
    parts = [
        f'<rect x="{left + step * n:.2f}" y="{top}" width="{step + 0.3:.2f}" height="9" '
        f'fill="{_colour((n + 0.5) / LEGEND_STEPS)}"/>'
        for n in range(LEGEND_STEPS)
    ]
    ends = [(left, "0"), (left + width / 2, "0.5"), (left + width, "1")]
    return [*parts, *(_text(x, top + 20, label, anchor="middle") for x, label in ends), _text(left - 22, top + 9, "R")]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _colour(value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    pairs = zip(COLOURS[index], COLOURS[index + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)
