"""Task lists: a list of keys and values within prose, and one key asked for at the end."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CODE_WORDS, GIVEN, NOUNS, Draw

ENTRIES = 10

Form = tuple[str, list[str], list[str], str, str]  # title, keys, values, a line of the list, the question


def _prices(draw: Draw) -> Form:
    line = "{key} = {value}"
    return "Stock list", draw.some(NOUNS, ENTRIES), draw.numbers(4, ENTRIES), line, "From the stock list:\n{key} ="


def _seats(draw: Draw) -> Form:
    line = "- {key}: seat {value}"
    return "Seating plan", draw.some(GIVEN, ENTRIES), draw.numbers(3, ENTRIES), line, "Seating plan:\n- {key}: seat"


def _signals(draw: Draw) -> Form:
    line = "* {key} -> {value}"
    return "Signals", draw.some(NOUNS, ENTRIES), draw.some(CODE_WORDS, ENTRIES), line, "Signals:\n* {key} ->"


def _table(draw: Draw) -> Form:
    line = "| {key} | {value} |"
    return "Lockers", draw.some(GIVEN, ENTRIES), draw.numbers(4, ENTRIES), line, "Lockers:\n\n| {key} |"


FORMS: tuple[Callable[[Draw], Form], ...] = (_prices, _seats, _signals, _table)


def lists(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; the list stands after 5 to 60 % of the filler."""
    title, keys, values, line, question = FORMS[number % len(FORMS)](draw)
    asked = draw.random.randrange(ENTRIES)
    entries = [line.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    depth = draw.between(0.05, 0.6)
    text = f"{GAP}\n\n{title}:\n\n" + "\n".join(entries) + f"\n\n{GAP}\n\n" + question.format(key=keys[asked])
    return Draft(text, values[asked], (depth, 1 - depth))
