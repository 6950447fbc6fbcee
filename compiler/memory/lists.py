"""Task lists: a list of keys and values within prose, and one key asked for at the end."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CODE_WORDS, NOUNS, Draw

ENTRIES = 8

Form = tuple[str, str, str, list[str]]  # title, what stands before a value, what after it, the values


def _stock(draw: Draw) -> Form:
    return "Stock list", "{key} =", "", draw.numbers(4, ENTRIES)


def _rooms(draw: Draw) -> Form:
    return "Rooms", "- {key}:", "", draw.numbers(3, ENTRIES)


def _signals(draw: Draw) -> Form:
    return "Signals", "* {key} ->", "", draw.some(CODE_WORDS, ENTRIES)


def _table(draw: Draw) -> Form:
    return "Catalogue", "| {key} |", " |", draw.numbers(4, ENTRIES)


FORMS: tuple[Callable[[Draw], Form], ...] = (_stock, _rooms, _signals, _table)


def lists(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; the list stands after 5 to 60 % of the filler."""
    title, before, after, values = FORMS[number % len(FORMS)](draw)
    keys, asked = draw.some(NOUNS, ENTRIES), draw.random.randrange(ENTRIES)
    beginnings = [before.format(key=key) for key in keys]
    entries = "\n".join(f"{beginning} {value}{after}" for beginning, value in zip(beginnings, values, strict=True))
    depth = draw.between(0.05, 0.6)
    text = f"{GAP}\n\n{title}:\n\n{entries}\n\n{GAP}\n\n{title}:\n\n{beginnings[asked]}"
    return Draft(text, values[asked], (depth, 1 - depth))
