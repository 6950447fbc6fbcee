"""Synthetic prose with facts that are stated once, made from a seed: what a cache must not forget.

Calibration text alone has few of them. Names, numbers and places are drawn anew for every sentence.
"""

import random
from collections.abc import Callable, Iterator

FIRST = "Mira Tomas Ilse Bram Noor Yusuf Petra Anselm Keiko Dario Wren Olga Femi Lucia Hamid Greta Ivo Sanna Pavel Rosa"
LAST = "Tallow Voss Okafor Lindqvist Marsh Petrov Alvarez Kimura Hale Duarte Brandt Nakai Osei Ferrant Quill Sorensen"
PLACES = "Harrow Bay, Lindenfeld, Port Alder, Old Mill Lane, Kestrel Point, Sundby, Tarn Hollow, Vantry, Copper Ridge"
THINGS = "ledger lantern kettle parcel telescope violin bicycle atlas toolbox umbrella rowing-boat coat barometer"
COLOURS = "green amber violet crimson ochre silver turquoise maroon white indigo"
ROOMS = "attic, cellar, north stair, reading room, greenhouse, workshop, pantry, archive, boiler room, gallery"
TRADES = "baker surveyor midwife cartographer glazier translator beekeeper organist locksmith botanist"
MONTHS = "January February March April May June July August September October November December"
CALLS = "search_flights list_orders set_timer convert_units get_forecast send_invoice read_sensor open_ticket"
SYLLABLES = "ba ke lo mi ru ta ve no shi zo pra dun fel gor hin jax quo wel yst cro"
WEATHER = "a thin rain, a dry wind from the hills, low fog, the first frost, a long spell of heat, heavy cloud"
DOINGS = (
    "swept the yard before anyone else was up, argued about the price of timber, walked twice around the pond, "
    "mended the gate with wire, wrote a letter and tore it up, counted the empty crates, waited for the late bus, "
    "sorted nails by length, read the newspaper aloud, painted one wall and left the others"
)
THOUGHTS = (
    "Nothing much came of it. It was the sort of day that leaves no trace. Later they laughed about it. "
    "The neighbours, as usual, had an opinion. Nobody wrote it down. There was time enough for that. "
    "In the end it made no difference. The dog slept through all of it. One gets used to such things."
)


class _Draw:
    """Random words of one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of(self, words: str, by: str | None = None) -> str:
        return self.random.choice([word for word in words.split(by) if word.strip()]).strip()

    def person(self) -> str:
        return f"{self.of(FIRST)} {self.of(LAST)}"

    def number(self, digits: int) -> str:
        return str(self.random.randrange(10 ** (digits - 1), 10**digits))

    def word(self) -> str:
        return "".join(self.of(SYLLABLES) for _ in range(self.random.randint(2, 3)))

    def code(self) -> str:
        letters = "".join(self.random.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(self.random.randint(2, 3)))
        return f"{letters}-{self.number(self.random.randint(2, 4))}"

    def date(self) -> str:
        return f"{self.random.randint(1, 28)} {self.of(MONTHS)} {self.random.randint(1790, 2031)}"


_FACTS: tuple[Callable[[_Draw], str], ...] = (
    lambda d: f"{d.person()} can be reached under extension {d.number(4)}.",
    lambda d: f"To open the safe in the {d.of(ROOMS, ',')}, dial {d.number(2)}-{d.number(2)}-{d.number(2)}.",
    lambda d: f"The {d.of(COLOURS)} {d.of(THINGS)} belongs to {d.person()}, who bought it for {d.number(3)} crowns.",
    lambda d: f"{d.person()} was born in {d.of(PLACES, ',')} on {d.date()}.",
    lambda d: f"Consignment {d.code()} went to {d.of(PLACES, ',')}, and it weighs {d.number(3)} kilograms.",
    lambda d: f"Among friends, {d.person()} goes by the nickname {d.word().capitalize()}.",
    lambda d: f"The {d.of(TRADES)} of {d.of(PLACES, ',')} is called {d.person()}.",
    lambda d: f"Remember this for later: the wireless network {d.word()} wants the word {d.word()}{d.number(3)}.",
    lambda d: f"The {d.of(THINGS)} is kept in the {d.of(ROOMS, ',')}, behind the {d.of(COLOURS)} {d.of(THINGS)}.",
    lambda d: f"{d.word()}: {d.number(5)}\n{d.word()}: {d.number(5)}\n{d.word()}: {d.number(5)}",
    lambda d: f'{{"name": "{d.of(CALLS)}", "arguments": {{"{d.word()}": "{d.code()}", "limit": {d.number(2)}}}}}',
    lambda d: (
        f"From now on, please sign every answer with {d.word().capitalize()} and use no more than {d.number(2)} words."
    ),
    lambda d: f"Of the {d.number(3)} visitors, {d.number(2)} came for {d.person()}'s talk on the {d.of(THINGS)}.",
)
_FILLERS: tuple[Callable[[_Draw], str], ...] = (
    lambda d: f"There was {d.of(WEATHER, ',')}, and {d.of(FIRST)} {d.of(DOINGS, ',')}.",
    lambda d: f"{d.of(THOUGHTS, '.')}.",
    lambda d: f"The {d.of(TRADES)} {d.of(DOINGS, ',')}, and the {d.of(TRADES)} {d.of(DOINGS, ',')}.",
    lambda d: f"In {d.of(PLACES, ',')} people spoke of {d.of(WEATHER, ',')} for a week.",
    lambda d: f"{d.of(FIRST)} had forgotten the {d.of(THINGS)} again, so they {d.of(DOINGS, ',')}.",
)


def fact_prose(seed: int) -> Iterator[str]:
    """Paragraphs without end, the same for the same seed: every third sentence, about, states a fact."""
    draw = _Draw(seed)
    while True:
        sentences = []
        for _ in range(draw.random.randint(4, 9)):
            kinds = _FACTS if draw.random.random() < 0.35 else _FILLERS
            sentences.append(draw.random.choice(kinds)(draw))
        yield " ".join(sentences) + "\n\n"
