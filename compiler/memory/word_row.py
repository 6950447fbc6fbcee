"""Task words: a row of words is given early, and has to be gone on with at the end."""

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import NOUNS, Draw

ROW, GIVEN = 12, 3


def word_row(draw: Draw, _: int) -> Draft:
    """The row stands after 2 to 30 % of the filler; three of its words are given, and the next two are the answer."""
    row = draw.some(NOUNS, ROW)
    start = draw.random.randrange(ROW - GIVEN - 1)
    depth = draw.between(0.02, 0.3)
    given, answer = row[start : start + GIVEN], row[start + GIVEN : start + GIVEN + 2]
    end = f"Once more, from the words to learn: {', '.join(given)},"
    text = f"{GAP}\n\nWords to learn by heart: {', '.join(row)}.\n\n{GAP}\n\n{end}"
    return Draft(text, ", ".join(answer), (depth, 1 - depth))
