"""Task few-shot: a made-up mapping is shown early, then comes other text, then it is applied to a new word."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CODE_WORDS, NOUNS, Draw, listed

SHOTS = 10
MARKS = listed("[[ ]],{{ }},<< >>,** **,/* */,(( )),~~ ~~,## ##,|| ||", by=",")

Mapping = Callable[[str], str]


def _word(draw: Draw) -> Mapping:
    word = draw.of(CODE_WORDS)
    return lambda noun: f"{noun} {word}"


def _marks(draw: Draw) -> Mapping:
    before, after = draw.of(MARKS).split()
    return lambda noun: f"{before}{noun}{after}"


def _number(draw: Draw) -> Mapping:
    number = draw.number(3)
    return lambda noun: f"{noun} {number}"


FORMS: tuple[Callable[[Draw], Mapping], ...] = (_word, _marks, _number)


def few_shot(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; at most 10 % of the filler come before the examples."""
    mapping = FORMS[number % len(FORMS)](draw)
    *shown, asked = draw.some(NOUNS, SHOTS + 1)
    depth = draw.between(0.02, 0.1)
    examples = "\n".join(f"{word} => {mapping(word)}" for word in shown)
    text = f"{GAP}\n\nTranslations:\n\n{examples}\n\n{GAP}\n\nTranslations:\n\n{asked} =>"
    return Draft(text, mapping(asked), (depth, 1 - depth))
