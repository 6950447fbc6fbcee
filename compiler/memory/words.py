"""Seeded draws of words, names and numbers, none of which the calibration's synthetic facts use."""

import random
from collections.abc import Sequence


def listed(text: str, by: str = " ") -> list[str]:
    """The words of a text, or its parts between other separators."""
    return text.split(by)


GIVEN = listed(
    "Alice Martin Sophie Daniel Emma Oliver Hannah Victor Clara Samuel Julia Peter Nora Simon Helen Arthur Lucy Edgar "
    "Irene Walter Diana Felix Martha Conrad"
)
FAMILY = listed(
    "Carter Bennett Hughes Morgan Foster Reed Palmer Turner Dawson Griffin Wallace Barnes Holt Pearce Webb Lawson "
    "Sutton Harper"
)
CITIES = listed(
    "Brighton Dresden Toledo Bergen Lucerne Bristol Geneva Lisbon Salzburg Antwerp Verona Aarhus Leeds Turin"
)
# Those of the filler, which are no answer.
BYSTANDERS = listed("Edward Louise Frank Agnes George Marion Henry Teresa Leonard Judith Robert Adele Philip Nancy")
TOWNS = listed("Ghent Malaga Tampere Krakow Bologna Utrecht Cork Porto Basel Rostock Nantes Graz")
STREETS = listed("Chestnut Station Church Castle Market Victoria Orchard Bridge Park Windmill")
ADJECTIVES = listed("narrow wooden rusty yellow square heavy dusty modern quiet broken polished crooked")
FURNITURE = listed("cabinet door locker vault shed drawer chest wardrobe gate container")
NOUNS = listed(
    "lamp chair river candle bottle garden pencil mirror basket window ladder pillow hammer carpet button saddle "
    "bridge feather blanket anchor engine helmet magnet needle"
)
PETS = listed("Biscuit Pepper Waffles Domino Marble Pickle Ginger Shadow Maple Cookie Bandit Sunny Misty Rocket")
CODE_WORDS = listed(
    "Thunder Falcon Emerald Harvest Compass Velvet Glacier Saffron Tornado Pelican Orchid Granite Comet Juniper "
    "Walnut Dragon"
)


class Draw:
    """Random words of one seed, which is any text: the same text, the same words."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def of(self, words: Sequence[str]) -> str:
        return self.random.choice(words)

    def some(self, words: Sequence[str], count: int) -> list[str]:
        """Different ones, in random order."""
        return self.random.sample(words, count)

    def number(self, digits: int) -> str:
        return str(self.random.randrange(10 ** (digits - 1), 10**digits))

    def numbers(self, digits: int, count: int) -> list[str]:
        """Different ones."""
        return [str(number) for number in self.random.sample(range(10 ** (digits - 1), 10**digits), count)]

    def between(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def person(self) -> str:
        return f"{self.of(GIVEN)} {self.of(FAMILY)}"
