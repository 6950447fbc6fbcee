"""Task few-shot: a made-up mapping is shown early, then comes other text, then it is applied to a new word."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CITIES, NOUNS, Draw

SHOTS = 8

Mapping = Callable[[str], str]


def _ending(draw: Draw) -> Mapping:
    ending = draw.ending()
    return lambda word: f"{word}{ending}"


def _beginning(draw: Draw) -> Mapping:
    beginning = draw.ending()
    return lambda word: f"{beginning} {word}"


def _frame(draw: Draw) -> Mapping:
    city = draw.of(CITIES)
    return lambda word: f"the {word} of {city}"


FORMS: tuple[Callable[[Draw], Mapping], ...] = (_ending, _beginning, _frame)


def few_shot(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; at most 10 % of the filler come before the examples."""
    mapping = FORMS[number % len(FORMS)](draw)
    *shown, asked = draw.some(NOUNS, SHOTS + 1)
    depth = draw.between(0.02, 0.1)
    examples = "\n".join(f"{word} => {mapping(word)}" for word in shown)
    text = f"{GAP}\n\nTranslations:\n\n{examples}\n\n{GAP}\n\nTranslations:\n\n{asked} =>"
    return Draft(text, mapping(asked), (depth, 1 - depth))
