"""Lines over two linear axes as an SVG file, written without any library."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 300  # of the plot itself
LEFT, TOP, BOTTOM = 70, 48, 50
LEGEND = 320
TICKS = 6
COLOURS = ("#0b4f9c", "#d6604d", "#1b7837", "#762a83", "#b8860b", "#444444", "#e377c2", "#17a2b8")
DASHES = ("", "6 3", "2 3")  # lines beyond the last colour take the next dash


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """The SVG text: every named line with its points, axes that start at 0, and a legend in the order of the lines."""
    right = _round_up(max((x for points in lines.values() for x, _ in points), default=1))
    top = _round_up(max((y for points in lines.values() for _, y in points), default=1))
    width, height = LEFT + WIDTH + LEGEND, TOP + HEIGHT + BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + WIDTH * x / right, TOP + HEIGHT * (1 - y / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 22, title, size=15),
        _text(LEFT, TOP - 8, y_label),
        _text(LEFT + WIDTH / 2, height - 12, x_label, anchor="middle"),
    ]
    for tick in range(TICKS + 1):
        x, _ = place(right * tick / TICKS, 0)
        _, y = place(0, top * tick / TICKS)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{top * tick / TICKS:,.5g}", anchor="end"))
        parts.append(_text(x, TOP + HEIGHT + 16, f"{right * tick / TICKS:,.5g}", anchor="middle"))
    for number, (name, points) in enumerate(lines.items()):
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        style = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2" fill="none" stroke-dasharray="{dash}"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" {style}><title>{escape(name)}</title></polyline>')
        y = TOP + 12 + 18 * number
        parts.append(f'<line x1="{LEFT + WIDTH + 14}" x2="{LEFT + WIDTH + 38}" y1="{y - 4}" y2="{y - 4}" {style}/>')
        parts.append(_text(LEFT + WIDTH + 44, y, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _round_up(value: float) -> float:
    """The next number that divides well: 1.2, 1.8, 2.4, 3, 4.5, 6, 9 or 12 times a power of ten."""
    if value <= 0:
        return 1
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1.2, 1.8, 2.4, 3, 4.5, 6, 9, 12) if step * power >= value)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:g}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
