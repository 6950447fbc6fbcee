"""Seeded draws of words, names and numbers, none of which the calibration's synthetic facts use."""

import random
from collections.abc import Sequence

GIVEN = (
    "Alice Martin Sophie Daniel Emma Oliver Hannah Victor Clara Samuel Julia Peter Nora Simon Helen Arthur Lucy Edgar "
    "Irene Walter Diana Felix Martha Conrad"
).split()
FAMILY = (
    "Carter Bennett Hughes Morgan Foster Reed Palmer Turner Dawson Griffin Wallace Barnes Holt Pearce Webb Lawson "
    "Sutton Harper"
).split()
CITIES = (
    "Brighton Dresden Toledo Bergen Lucerne Bristol Geneva Lisbon Salzburg Antwerp Verona Aarhus Leeds Turin".split()
)
# Those of the filler, which are no answer.
BYSTANDERS = "Edward Louise Frank Agnes George Marion Henry Teresa Leonard Judith Robert Adele Philip Nancy".split()
TOWNS = "Ghent Malaga Tampere Krakow Bologna Utrecht Cork Porto Basel Rostock Nantes Graz".split()
STREETS = "Chestnut Station Church Castle Market Victoria Orchard Bridge Park Windmill".split()
ADJECTIVES = "narrow wooden rusty yellow square heavy dusty modern quiet broken polished crooked".split()
FURNITURE = "cabinet door locker vault shed drawer chest wardrobe gate container".split()
NOUNS = (
    "lamp chair river candle bottle garden pencil mirror basket window ladder pillow hammer carpet button saddle "
    "bridge feather blanket anchor engine helmet magnet needle"
).split()
PETS = "Biscuit Pepper Waffles Domino Marble Pickle Ginger Shadow Maple Cookie Bandit Sunny Misty Rocket".split()
CODE_WORDS = (
    "Thunder Falcon Emerald Harvest Compass Velvet Glacier Saffron Tornado Pelican Orchid Granite Comet Juniper "
    "Walnut Dragon"
).split()


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
