"""Task variables: values are assigned and handed on to other variables, one of which is asked for."""

from keysieve.compiler.memory.trial import GAP, Draft
from keysieve.compiler.memory.words import NOUNS, Draw

CHAINS = 2


def variables(draw: Draw, _: int) -> Draft:
    """Two variables get values, later two others get theirs from them, with filler between all of it."""
    names, values = draw.some(NOUNS, 2 * CHAINS), draw.numbers(4, CHAINS)
    first, second = names[:CHAINS], names[CHAINS:]
    lines = [f"{name} = {value}" for name, value in zip(first, values, strict=True)]
    lines += [f"{name} = {origin}" for name, origin in zip(second, first, strict=True)]
    asked = draw.random.randrange(CHAINS)
    text = f"{GAP}\n\n" + "".join(f"{line}\n\n{GAP}\n\n" for line in lines)
    text += f"Question: Which number is {second[asked]}?\nAnswer: The number of {second[asked]} is"
    gaps = len(lines) + 1
    return Draft(text, values[asked], (1 / gaps,) * gaps)
