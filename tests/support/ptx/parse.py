"""PTX text, as Triton emits it, to basic blocks of instructions."""

import re
from dataclasses import dataclass
from functools import cache

JUMPS = ("bra", "ret", "exit", "bar")  # they end a basic block: at `bar.sync` a warp stops and waits
Operand = str | tuple[str, ...]

_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


class PtxError(Exception):
    """What a kernel did wrong, or what the interpreter does not know; the message names the line."""


@dataclass(frozen=True)
class Instruction:
    """One statement: `@!%p1 st.global.b32 [ %rd1 + 0 ], { %r1 };` -> guard, parts of the opcode, operands."""

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


Block = list[tuple[int, Instruction]]  # (line of the file from 1, instruction); the last may jump, wait or return


@dataclass
class Kernel:
    """One entry point: its parameters in order, its blocks in the order of the file, and where labels point."""

    name: str
    parameters: list[tuple[str, str]]  # (name, type: "u64", "u32", ...)
    threads: int
    registers: dict[str, str]  # prefix or name -> type: "%r" -> "b32", "%p" -> "pred"
    blocks: list[Block]
    labels: dict[str, int]
    shared_granule: int  # bytes of the smallest access to shared memory


def parse(text: str) -> Kernel:
    """Read the one entry point of a PTX file. Raises PtxError where it does not look like Triton's output."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
    if head is None:
        raise PtxError("no .entry in this PTX file")
    parameters = [(name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)\s[^,]*?(\w+)\s*(?:,|$)", head[2])]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise PtxError(f"{head[1]}: the PTX does not say how many threads a block has (.reqntid)")
    kernel = Kernel(head[1], parameters, int(threads[1]), {}, [[]], {}, 4)
    first = text.count("\n", 0, head.end()) + 1
    depth = 1
    for line, code in enumerate(text.splitlines()[first - 1 :], first):
        code = code.split("//")[0] if line > first else code.rpartition("{")[2].split("//")[0]
        depth += code.count("{") - code.count("}")
        if depth == 0:
            break
        for statement in code.split(";"):
            _add(kernel, line, statement.strip())
    return kernel


def _add(kernel: Kernel, line: int, statement: str) -> None:
    statement = statement.lstrip("{} \t")  # the braces of inline assembly's own scope
    label = re.match(r"(\$?\w+):", statement)
    if label:
        if kernel.blocks[-1]:
            kernel.blocks.append([])
        kernel.labels[label[1]] = len(kernel.blocks) - 1
        statement = statement[label.end() :].strip()
    declaration = _DECLARATION.match(statement)
    if declaration:
        for name in declaration[2].split(","):
            kernel.registers[name.split("<")[0].strip()] = declaration[1]
    if not statement or statement.startswith((".reg", ".loc", ".pragma")):
        return
    instruction = decode(statement)
    kernel.blocks[-1].append((line, instruction))
    if instruction.opcode[0] in JUMPS:
        kernel.blocks.append([])
    if instruction.opcode[1:2] and instruction.opcode[1].startswith("shared"):
        kernel.shared_granule = min(kernel.shared_granule, int(re.sub(r"\D", "", instruction.opcode[-1])) // 8)


@cache
def decode(statement: str) -> Instruction:
    """One statement without its semicolon. Raises PtxError if it is none."""
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise PtxError(f"not an instruction: {statement!r}")
    operands = tuple(
        tuple(part.strip() for part in operand[1:-1].split(",")) if operand.startswith("{") else operand.strip()
        for operand in _OPERAND.findall(match[4])
    )
    return Instruction(match[2], match[1] == "!", tuple(match[3].split(".")), operands, statement)
