"""Task chat: a dialogue of several turns, with something said in an early one that the last one asks for."""

from collections.abc import Callable

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import CITIES, GIVEN, PETS, Draw

TURNS = 4  # of small talk

Said = tuple[str, str, str, str]  # what is said, the question, the beginning of the answer, the answer

SMALL_TALK = (
    "Please tell me about your day.",
    "And what happened after that?",
    "What else did you notice?",
    "Could you describe the neighbourhood?",
    "Do you remember the weekend?",
    "I would like to hear another story.",
    "Who else was there?",
    "What do people do there?",
)


def _name(draw: Draw) -> Said:
    name = draw.of(GIVEN)
    return f"Hello! My name is {name}.", "Do you still know my name?", "Yes, your name is", name


def _parrot(draw: Draw) -> Said:
    pet = draw.of(PETS)
    return (
        f"Hello! I have a parrot, and my parrot is called {pet}.",
        "What did I say my parrot is called?",
        "You said that your parrot is called",
        pet,
    )


def _city(draw: Draw) -> Said:
    city = draw.of(CITIES)
    return (
        f"Hello! I am moving to {city} soon.",
        "Where did I say I am moving?",
        "You said that you are moving to",
        city,
    )


def _train(draw: Draw) -> Said:
    number = draw.number(3)
    return (
        f"Hello! I am waiting for train number {number}.",
        "Which train am I waiting for?",
        "You are waiting for train number",
        number,
    )


FORMS: tuple[Callable[[Draw], Said], ...] = (_name, _parrot, _city, _train)


def chat(draw: Draw, number: int) -> Draft:
    """The form goes round with the trial's number; it is said in the first turn, or in the second."""
    said, question, beginning, answer = FORMS[number % len(FORMS)](draw)
    turns, early = [], number // len(FORMS) % 2
    for place, talk in enumerate(draw.some(SMALL_TALK, TURNS)):
        turns += [("user", f"{said} {talk}" if place == early else talk), ("assistant", GAP)]
    turns.append(("user", question))
    return Draft(beginning, answer, (1 / TURNS,) * TURNS, turns)
