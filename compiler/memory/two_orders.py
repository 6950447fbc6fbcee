"""Task both: two instructions of the same kind in different places, and one of them is due."""

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CODE_WORDS, Draw


def two_orders(draw: Draw, number: int) -> Draft:
    """One instruction in the first tenth, one around the middle; even trials ask for the first, odd for the second."""
    opening, closing = words = draw.some(CODE_WORDS, 2)
    first, second = draw.between(0.02, 0.1), draw.between(0.4, 0.6)
    text = (
        f"{GAP}\n\nInstruction: the letter has to be opened with the code word {opening}.\n\n{GAP}\n\n"
        f"Instruction: the letter has to be closed with the code word {closing}.\n\n{GAP}\n\n"
        f"The letter is ready. As instructed, it is {('opened', 'closed')[number % 2]} with the code word"
    )
    return Draft(text, words[number % 2], (first, second, 1 - first - second))
