"""Tasks niah-noise and niah-needle: a number hidden in a few sentences repeated on end, or among its like."""

from collections.abc import Iterator

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import ADJECTIVES, FURNITURE, Draw

NOISE = "The road is long.|The moon is bright.|The snow is deep.|We sail at noon.|Here it comes, and there it goes."
DIGITS = 6


def niah_noise(draw: Draw, _: int) -> Draft:
    """One needle after 5 to 80 % of the same few sentences."""

    def noise(_: Draw) -> Iterator[str]:
        while True:
            yield from NOISE.split("|")

    thing = f"{draw.of(ADJECTIVES)} {draw.of(FURNITURE)}"
    return _needle(draw, thing, Draft("", draw.number(DIGITS), filler=noise))


def niah_needle(draw: Draw, _: int) -> Draft:
    """All other sentences are needles too, of other things and with other numbers."""
    things = [f"{adjective} {thing}" for adjective in ADJECTIVES for thing in FURNITURE]
    asked = draw.of(things)
    answer = draw.number(DIGITS)

    def needles(draw: Draw) -> Iterator[str]:
        while True:
            thing, number = draw.of(things), draw.number(DIGITS)
            if thing != asked and number != answer:
                yield _sentence(thing, number)

    return _needle(draw, asked, Draft("", answer, filler=needles))


def _needle(draw: Draw, thing: str, draft: Draft) -> Draft:
    """The draft with its needle at some depth, and the question."""
    depth = draw.between(0.05, 0.8)
    needle = _sentence(thing, draft.answer)
    text = f"{GAP} {needle} {GAP}\n\nQuestion: What is the magic number of the {thing}?\nAnswer: "
    text += needle.removesuffix(f" {draft.answer}.")
    return Draft(text, draft.answer, (depth, 1 - depth), filler=draft.filler)


def _sentence(thing: str, number: str) -> str:
    return f"The magic number of the {thing} is {number}."
