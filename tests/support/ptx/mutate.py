"""PTX with one thing wrong, to see whether the checks notice."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


@dataclass(frozen=True)
class Mutant:
    """`kind` is "barrier" (a bar.sync less), "guard" (`@%p` is `@!%p`) or "compare" (setp asks the opposite)."""

    kind: str
    line: int
    original: str
    ptx: str


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every PTX that differs from this one in one barrier, one guard or one comparison."""
    lines = ptx.split("\n")
    for number, line in enumerate(lines, 1):
        code = line.split("//")[0]
        kind, changed = _change(code)
        if changed != code:
            yield Mutant(kind, number, code.strip(), "\n".join([*lines[: number - 1], changed, *lines[number:]]))


def _change(code: str) -> tuple[str, str]:
    if "bar.sync" in code:
        return "barrier", ""
    if re.search(r"@!?%p", code):
        return "guard", code.replace("@!", "@") if "@!" in code else code.replace("@", "@!")
    return "compare", re.sub(r"(setp\.)(\w\w)(\.)", lambda m: m[1] + _OPPOSITE[m[2]] + m[3], code)
