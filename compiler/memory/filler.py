"""Prose without facts that a task asks for: sentences of many forms, without end, from a seed. It has no digits."""

from collections.abc import Callable, Iterator

from keysieve.compiler.memory.words import BYSTANDERS, TOWNS, Draw, listed

SOMEBODY = listed(
    "the old teacher, a young couple from the coast, the woman at the counter, one of the drivers, my uncle, "
    "the night nurse, a group of students, the man with the accordion, our landlady, the new librarian, a tired clerk, "
    "the twins next door, a retired captain, the cook, somebody from the council, the girl on the balcony",
    by=", ",
)
DID = listed(
    "stopped to look at the swans, asked for another cup of tea, laughed without saying why, opened all the shutters, "
    "hummed a tune from the radio, carried the boxes upstairs, drew a map on a napkin, forgot to lock the bicycle, "
    "told the story of the flood again, leaned against the wall and yawned, looked for a pair of gloves, "
    "bought a bag of cherries, hung the washing between two trees, talked about moving to the south, "
    "fed the pigeons with crumbs, played chess against nobody, repaired the radio on the kitchen table, "
    "took a photograph of the clouds, cut the hedge far too short, dropped a spoon and left it there",
    by=", ",
)
WHEN = listed(
    "on most evenings, towards the end of summer, after the concert, just before lunch, every other weekend, "
    "at that hour, some years earlier, during the holidays, while the shops were closed, "
    "by the time the lights came on, shortly after breakfast, on the way home, when the wind dropped, "
    "between two meetings",
    by=", ",
)
WHERE = listed(
    "in the park behind the theatre, at the corner of the square, near the tram stop, beside the canal, "
    "in front of the town hall, under the railway arch, on the hill above the harbour, at the back of the bakery, "
    "along the river path, in the waiting room, on the steps of the church, among the market stalls",
    by=", ",
)
THINGS = listed(
    "the soup, the new timetable, the noise from the building site, the smell of paint, the long queue, the music, "
    "the broken fountain, the taste of the bread, the morning paper, the colour of the sea, the stairs, "
    "the empty chair",
    by=", ",
)
SEEMED = listed(
    "hardly worth mentioning, better than expected, a little strange, much the same as ever, a reason to stay longer, "
    "impossible to explain, older than it looked, good enough for a rainy afternoon, a matter of taste, "
    "quite comforting",
    by=", ",
)
REMARKS = listed(
    "It was pleasant enough.|No one seemed to be in a hurry.|There are worse ways to spend an afternoon.|"
    "Then it was quiet again.|That was how things were done there.|Perhaps it was only the light.|"
    "The conversation drifted to other things.|Everybody agreed, more or less.|Still, it was hard to be sure.|"
    "After a while the rain stopped.|The rest of the day passed slowly.|Some said it had always been like that.",
    by="|",
)

_FORMS: tuple[Callable[[Draw], str], ...] = (
    lambda d: f"{_capital(d.of(WHEN))}, {d.of(SOMEBODY)} {d.of(DID)}.",
    lambda d: f"{_capital(d.of(SOMEBODY))} {d.of(DID)}, and {d.of(SOMEBODY)} {d.of(DID)}.",
    lambda d: f"{_capital(d.of(WHERE))}, {d.of(SOMEBODY)} {d.of(DID)}.",
    lambda d: f"{_capital(d.of(THINGS))} seemed {d.of(SEEMED)}.",
    lambda d: (
        f"{d.of(BYSTANDERS)} thought that {d.of(THINGS)} was {d.of(SEEMED)}, but {d.of(SOMEBODY)} thought otherwise."
    ),
    lambda d: f"In {d.of(TOWNS)}, {d.of(WHEN)}, one could see how {d.of(SOMEBODY)} {d.of(DID)}.",
    lambda d: f"{d.of(BYSTANDERS)} and {d.of(BYSTANDERS)} met {d.of(WHERE)} and spoke about {d.of(THINGS)}.",
    lambda d: f"What {d.of(BYSTANDERS)} liked best about {d.of(TOWNS)} was {d.of(THINGS)}.",
    lambda d: f"Although {d.of(THINGS)} was {d.of(SEEMED)}, {d.of(SOMEBODY)} {d.of(DID)} {d.of(WHEN)}.",
    lambda d: f'"I could get used to {d.of(THINGS)}," said {d.of(BYSTANDERS)} {d.of(WHEN)}.',
    lambda d: f"Nobody knew why {d.of(SOMEBODY)} {d.of(DID)} {d.of(WHERE)}.",
    lambda d: f"Once {d.of(BYSTANDERS)} {d.of(DID)}, {d.of(THINGS)} no longer mattered.",
    lambda d: d.of(REMARKS),
    lambda d: d.of(REMARKS),
)


def filler(draw: Draw) -> Iterator[str]:
    """Sentences without end; the same form never comes twice in a row."""
    before = None
    while True:
        form = draw.random.choice(_FORMS)
        if form is not before:
            before = form
            yield form(draw)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
