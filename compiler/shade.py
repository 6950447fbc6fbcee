"""The colours of every heat map: from light to dark, so that they also tell apart without colour."""

COLOURS = ((253, 231, 204), (214, 96, 110), (46, 20, 84))  # of 0, 0.5 and 1


def shade(value: float) -> str:
    """The colour of a value from 0 to 1, as #rrggbb; values beyond have that of the nearer end."""
    place = min(max(value, 0.0), 1.0) * (len(COLOURS) - 1)
    index = min(int(place), len(COLOURS) - 2)
    pairs = zip(COLOURS[index], COLOURS[index + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)
