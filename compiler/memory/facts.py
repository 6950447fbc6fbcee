"""Task facts: a fact is stated once in prose, at some depth, and asked for at the end."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import ADJECTIVES, CITIES, CODE_WORDS, FAMILY, FURNITURE, PETS, STREETS, Draw

Fact = tuple[str, str, str, str]  # sentence, question, beginning of the answer, answer


def _passcode(draw: Draw) -> Fact:
    thing, code = f"{draw.of(ADJECTIVES)} {draw.of(FURNITURE)}", draw.number(5)
    return (
        f"The passcode of the {thing} is {code}.",
        f"What is the passcode of the {thing}?",
        f"The passcode of the {thing} is",
        code,
    )


def _locker(draw: Draw) -> Fact:
    who, number = draw.person(), draw.number(4)
    return (
        f"At the swimming pool, {who} has locker number {number}.",
        f"Which locker does {who} have?",
        f"{who} has locker number",
        number,
    )


def _ferry(draw: Draw) -> Fact:
    city, pier = draw.of(CITIES), draw.number(2)
    return (
        f"Travellers should note that the ferry to {city} leaves from pier {pier}.",
        f"From which pier does the ferry to {city} leave?",
        f"The ferry to {city} leaves from pier",
        pier,
    )


def _museum(draw: Draw) -> Fact:
    city, year = draw.of(CITIES), str(draw.random.randint(1701, 1969))
    return (
        f"The puppet museum in {city} was founded in the year {year}.",
        f"When was the puppet museum in {city} founded?",
        f"The puppet museum in {city} was founded in the year",
        year,
    )


def _dog(draw: Draw) -> Fact:
    who, dog = draw.person(), draw.of(PETS)
    return (
        f"{who} told everyone that her dog is called {dog}.",
        f"What is the name of {who}'s dog?",
        f"{who}'s dog is called",
        dog,
    )


def _street(draw: Draw) -> Fact:
    family, number, street = draw.of(FAMILY), draw.number(3), draw.of(STREETS)
    return (
        f"The {family} family moved to {number} {street} Street in spring.",
        f"To which address did the {family} family move?",
        f"The {family} family moved to",
        f"{number} {street} Street",
    )


def _password(draw: Draw) -> Fact:
    club, word = f"{draw.of(CITIES)} chess club", draw.of(CODE_WORDS)
    return (
        f"Members of the {club} agreed on the password {word}.",
        f"What is the password of the {club}?",
        f"The members of the {club} agreed on the password",
        word,
    )


FORMS: tuple[Callable[[Draw], Fact], ...] = (_passcode, _locker, _ferry, _museum, _dog, _street, _password)


def facts(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; the depth is drawn from 5 to 80 % of the filler."""
    fact, question, beginning, answer = FORMS[number % len(FORMS)](draw)
    depth = draw.between(0.05, 0.8)
    text = f"{GAP} {fact} {GAP}\n\nQuestion: {question}\nAnswer: {beginning}"
    return Draft(text, answer, (depth, 1 - depth))
