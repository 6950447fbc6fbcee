"""Task instructions: one is given early, and what it asks for is due at the end."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CODE_WORDS, NOUNS, Draw

Order = tuple[str, str, str]  # instruction, end of the prompt, answer


def _reply(draw: Draw) -> Order:
    noun, word = draw.of(NOUNS), draw.of(CODE_WORDS)
    return (
        f"Instruction: any question about the {noun} gets the answer {word}, and nothing else.",
        f"Question: What about the {noun}?\nAs instructed, the answer is the word",
        word,
    )


def _closing(draw: Draw) -> Order:
    word = draw.of(CODE_WORDS)
    return (
        f"Instruction: the text below has to be closed with the code word {word}.",
        "This is the end of the text. As instructed, it is closed with the code word",
        word,
    )


def _address(draw: Draw) -> Order:
    title = f"Professor {draw.of(CODE_WORDS)}"
    return (
        f"Instruction: the reader of this story has to be addressed as {title}.",
        "The story is over. As instructed, the reader is addressed as",
        title,
    )


def _label(draw: Draw) -> Order:
    label = draw.number(4)
    return (
        f"Instruction: file this report under the number {label} as soon as it has been read.",
        "The report has been read. It is filed under the number",
        label,
    )


FORMS: tuple[Callable[[Draw], Order], ...] = (_reply, _closing, _address, _label)


def instructions(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; at most 10 % of the filler come before the instruction."""
    order, end, answer = FORMS[number % len(FORMS)](draw)
    depth = draw.between(0.02, 0.1)
    return Draft(f"{GAP}\n\n{order}\n\n{GAP}\n\n{end}", answer, (depth, 1 - depth))
