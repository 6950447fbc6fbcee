"""One PTX instruction to one small Python function over all lanes, by way of its source.

The function sees R (registers: raw bits as unsigned arrays [n], predicates as bool), M (the lanes that run it, or
None for all), W (the lanes whose registers may change: as M, but None also if all others are done), S (special
registers) and X (the machine: memory, parameters and the check of operations across a warp).
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import arithmetic
from .parse import Operand, PtxError, decode

SHARED_BASE = 0x400  # where shared memory starts, so that a null pointer is out of bounds
Step = Callable[[dict, "np.ndarray | None", "np.ndarray | None", dict, Any], None]

_STORED = {"pred": "?", "b16": "u2", "b32": "u4", "b64": "u8", "s32": "u4", "u32": "u4", "f32": "u4"}
_TYPES = {
    kind + str(bits): f"{letter}{bits // 8}"
    for kind, letter in zip("bus", "uui", strict=True)
    for bits in (8, 16, 32, 64)
}
_TYPES |= {"f16": "f2", "f32": "f4", "f64": "f8", "pred": "?"}
# {a}, {b}, ... are the operands in the instruction's type or the one named, {t} that type, {w} one twice as wide.
_ANY = {
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "neg": "-{a}",
    "abs": "np.abs({a})",
    "selp": "np.where({c:?}, {a}, {b})",
    "mov": "np.full(X.lanes, {a})",
}
_INTEGER = _ANY | {
    "and": "{a} & {b}",
    "or": "{a} | {b}",
    "xor": "{a} ^ {b}",
    "not": "~{a}",
    "min": "np.minimum({a}, {b})",
    "max": "np.maximum({a}, {b})",
    "shl": "shift_left({a}, {b:u4})",
    "shr": "shift_right({a}, {b:u4})",
    "mul.lo": "{a} * {b}",
    "mad.lo": "{a} * {b} + {c}",
    "mul.hi": "multiply_high({a}, {b})",
    "mul.wide": "{a}.astype('{w}') * {b}",
    "mad.wide": "{a}.astype('{w}') * {b} + {c:w}",
    "div": "quotient({a}, {b})",
    "rem": "{a} - quotient({a}, {b}) * {b}",
    "popc": "np.bitwise_count({a}).astype('u4')",
    "bfe": "bit_field({a}, {b:u4}, {c:u4})",
    "prmt": "permute_bytes({a}, {b}, {c})",
    "lop3": "lookup3({a}, {b}, {c}, {d})",
}
_FLOAT = _ANY | {
    "mul": "{a} * {b}",
    "fma": "({a}.astype('f8') * {b} + {c}).astype('{t}')",
    "div": "{a} / {b}",
    "rcp": "(1 / {a})",
    "sqrt": "np.sqrt({a})",
    "rsqrt": "(1 / np.sqrt({a}))",
    "ex2": "np.exp2({a})",
    "lg2": "np.log2({a})",
    "min": "np.fmin({a}, {b})",  # of a number and a NaN, the number
    "max": "np.fmax({a}, {b})",
}
_ROUND = {"rni": "np.rint({a})", "rzi": "np.trunc({a})", "rmi": "np.floor({a})", "rpi": "np.ceil({a})"}
_EXACTNESS = {"rn", "approx", "full", "ftz"}  # ftz: denormals are kept, which no check here can tell
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_COMBINE = {"and": "&", "or": "|", "xor": "^"}
_REDUCE = {
    "add": "add",
    "min": "minimum",
    "max": "maximum",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
_NOTHING = ("bar.warp.sync", "membar", "fence.acq_rel", "fence.sc")  # a warp runs in lockstep, memory is consistent
_MODIFIER = re.compile(r"global|shared(::cta)?|relaxed|acquire|release|volatile|weak|nc|gpu|cta|sys|L[12]::\w+|v[248]")


def blend(lanes: np.ndarray, new: np.ndarray, registers: dict, name: str) -> np.ndarray:
    """What a register holds after some lanes wrote it; junk where no lane has written yet."""
    old = registers.get(name)
    return np.where(lanes, new, np.uint64(0xDEADBEEF).astype(new.dtype) if old is None else old)


def narrow(mask: np.ndarray | None, guard: np.ndarray) -> np.ndarray:
    return guard if mask is None else mask & guard


@cache
def translate(text: str, registers: tuple[tuple[str, str], ...]) -> Step:
    """The function of a statement that is no jump. Raises PtxError for an instruction that is not known."""
    instruction = decode(text)
    translation = _Translation(instruction.opcode, instruction.operands, dict(registers), {})
    lines = translation.lines()
    if instruction.guard:
        lines = [
            f"W = M = narrow(M, {'~' * instruction.negated}R['{instruction.guard}'])",
            "if not M.any(): return",
            *lines,
        ]
    scope = vars(arithmetic) | translation.constants | {"blend": blend, "narrow": narrow}
    exec("def step(R, W, M, S, X):\n " + "\n ".join([*lines, "return"]), scope)
    return scope["step"]


@dataclass
class _Source:
    """An operand that formats itself as Python source, `{a}` in the instruction's type and `{a:u4}` as uint32."""

    translation: "_Translation"
    operand: Operand
    dtype: str
    wide: str

    def __format__(self, dtype: str) -> str:
        return self.translation.read(self.operand, {"": self.dtype, "w": self.wide}.get(dtype, dtype))


@dataclass
class _Translation:
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    registers: dict[str, str]
    constants: dict[str, Any]

    def lines(self) -> list[str]:
        special = getattr(self, f"_{self.opcode[0]}", None)
        if ".".join(self.opcode).startswith(_NOTHING):
            return []
        return special() if special else self._compute()

    def _compute(self) -> list[str]:
        """Everything that is one expression in the operands."""
        name, *middle, kind = self.opcode
        if kind not in _TYPES:
            raise self.unknown()
        if name == "mov" and not all(isinstance(operand, str) for operand in self.operands):
            return self._pack(_TYPES[kind])
        table = _FLOAT if kind[0] == "f" else _INTEGER
        if middle and f"{name}.{middle[0]}" in table:
            name = f"{name}.{middle.pop(0)}"
        if name in ("min", "max") and middle == ["NaN"]:
            return self.write(self.operands[0], self.fill(f"np.{name}imum({{a}}, {{b}})", _TYPES[kind]))
        if name not in table or not set(middle) <= _EXACTNESS:
            raise self.unknown()
        return self.write(self.operands[0], self.fill(table[name], _TYPES[kind]))

    def _setp(self) -> list[str]:
        _, compare, *combine, kind = self.opcode
        unordered = kind[0] == "f" and compare.endswith("u") and compare[:-1] in _COMPARE
        compare = compare[:-1] if unordered else compare
        if compare not in _COMPARE or kind not in _TYPES or not set(combine) <= {*_COMBINE, "ftz"}:
            raise self.unknown()
        value = self.fill(f"({{a}} {_COMPARE[compare]} {{b}})", _TYPES[kind])
        if kind[0] == "f":
            value += self.fill(
                " | np.isnan({a}) | np.isnan({b})" if unordered else " & ({a} == {a}) & ({b} == {b})", _TYPES[kind]
            )
        for name in combine:
            if name in _COMBINE:
                value = f"({value}) {_COMBINE[name]} {self.read(self.operands[3], '?')}"
        return self.write(self.operands[0], value)

    def _cvt(self) -> list[str]:
        *middle, to, of = self.opcode[1:]
        if to == "bf16x2" and of == "f32" and set(middle) <= {"rn"}:
            high, low = (self.read(operand, "f4") for operand in self.operands[1:])
            return self.write(self.operands[0], f"to_bf16({high}).astype('u4') << 16 | to_bf16({low})")
        a = (
            f"from_bf16({self.read(self.operands[1], 'u2')})"
            if of == "bf16"
            else self.read(self.operands[1], _TYPES[of])
        )
        rounding = [_ROUND[name].format(a=a) for name in middle if name in _ROUND]
        if not set(middle) <= _EXACTNESS | set(_ROUND) or (to == "bf16" and of != "f32"):
            raise self.unknown()
        a = rounding[0] if rounding else a
        if to == "bf16":
            return self.write(self.operands[0], f"to_bf16({a})")
        whole = of.startswith(("f", "bf")) and to[0] in "us"
        return self.write(
            self.operands[0], f"to_integer({a}, '{_TYPES[to]}')" if whole else f"{a}.astype('{_TYPES[to]}')"
        )

    def _cvta(self) -> list[str]:
        return self.write(self.operands[0], f"np.full(X.lanes, {self.read(self.operands[1], 'u8')})")

    def _ld(self) -> list[str]:
        dtype = _TYPES.get(self.opcode[-1], "")
        if self.opcode[1] == "param":
            value = f"X.parameter({self._address(self.operands[1])}, M)"
            return self.write(self.operands[0], f"{value}.astype('{dtype}')")
        where, size, count = self._access(self.operands[1], self.operands[0])
        targets = self.operands[0] if isinstance(self.operands[0], tuple) else self.operands[:1]
        lines = [f"values = X.load({where}, {size}, {count}, M)"]
        for index, target in enumerate(targets):
            lines += self.write(target, f"values[{index}].view('{dtype}')")
        return lines

    def _st(self) -> list[str]:
        where, size, _ = self._access(self.operands[0], self.operands[1])
        sources = self.operands[1] if isinstance(self.operands[1], tuple) else self.operands[1:]
        values = ", ".join(self.read(source, f"u{size}") for source in sources)
        return [f"X.store({where}, {size}, ({values},), M)"]

    def _prefetch(self) -> list[str]:
        if self.opcode[1:] != ("global", "L2"):
            raise self.unknown()
        return [f"X.prefetch({self._address(self.operands[0])}, M)"]

    def _shfl(self) -> list[str]:
        target, _, valid = str(self.operands[0]).partition("|")
        value, by, clamp, members = (self.read(operand, "u4") for operand in self.operands[1:])
        lines = [f"X.converged(M, {members})", f"value, valid = shuffle('{self.opcode[2]}', {value}, {by}, {clamp})"]
        return lines + self.write(target, "value") + (self.write(valid, "valid") if valid else [])

    def _redux(self) -> list[str]:
        value, members = self.read(self.operands[1], _TYPES[self.opcode[3]]), self.read(self.operands[2], "u4")
        reduction = f"reduce_warp({value}, np.{_REDUCE[self.opcode[2]]})"
        return [f"X.converged(M, {members})", *self.write(self.operands[0], reduction)]

    def _vote(self) -> list[str]:
        vote, members = self.read(self.operands[1], "?"), self.read(self.operands[2], "u4")
        votes = {
            "ballot": f"ballot({vote})",
            "all": f"reduce_warp({vote}, np.logical_and)",
            "any": f"reduce_warp({vote}, np.logical_or)",
        }
        return [f"X.converged(M, {members})", *self.write(self.operands[0], votes[self.opcode[2]])]

    def _pack(self, dtype: str) -> list[str]:
        """mov between a register and the registers of its parts, the lowest first."""
        target, source = self.operands
        if isinstance(source, tuple):
            part = int(dtype[1]) // len(source)
            parts = (
                f"np.asarray({self.read(name, f'u{part}')}, 'u8') << {8 * part * i}" for i, name in enumerate(source)
            )
            return self.write(target, f"np.full(X.lanes, {' | '.join(parts)}).astype('{dtype}')")
        part = int(dtype[1]) // len(target)
        whole = self.read(source, dtype)
        return [
            line
            for i, name in enumerate(target)
            for line in self.write(name, f"({whole} >> {8 * part * i}).astype('u{part}')")
        ]

    def _access(self, place: Operand, values: Operand) -> tuple[str, int, int]:
        """(space and address as source, bytes of one value, number of values) of a load or store."""
        *flags, kind = self.opcode[1:]
        if kind not in _TYPES or not all(_MODIFIER.fullmatch(flag) for flag in flags):
            raise self.unknown()
        space = next((flag[:6] for flag in flags if flag[:6] in ("global", "shared")), None)
        if space is None:
            raise self.unknown()
        count = len(values) if isinstance(values, tuple) else 1
        return f"'{space}', {self._address(place)}", int(_TYPES[kind][1]), count

    def _address(self, place: Operand) -> str:
        """`[%r1 + 16]` as source."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", str(place))
        if match is None:
            raise self.unknown()
        return f"{self.read(match[1], 'i8')} + {int(match[2] or '0', 0)}"

    def fill(self, template: str, dtype: str) -> str:
        wide = f"{dtype[0]}{2 * int(dtype[1])}" if dtype != "?" else ""
        sources = [_Source(self, operand, dtype, wide) for operand in self.operands[1:]]
        return template.format(**dict(zip("abcd", sources, strict=False)), t=dtype, w=wide)

    def read(self, operand: Operand, dtype: str) -> str:
        """The source of an operand seen as a numpy dtype; a wider register gives its low bits."""
        if not isinstance(operand, str):
            raise self.unknown()
        if operand == "global_smem":
            return self.constant(SHARED_BASE, dtype)
        if parameter := re.fullmatch(r"[A-Za-z_]\w*_param_(\d+)", operand):
            return self.constant(8 * int(parameter[1]), dtype)
        if re.fullmatch(r"%(n?tid|n?ctaid)\.[xyz]|%laneid|%warpid", operand):
            return f"S['{operand}'].astype('{dtype}')"
        if re.fullmatch(r"0[fd][0-9a-fA-F]+", operand):
            bits = bytes.fromhex(operand[2:])
            value = struct.unpack(">f" if operand[1] == "f" else ">d", bits)[0]
            return self.constant(value if dtype[0] == "f" else int.from_bytes(bits, "big"), dtype)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return self.constant(int(operand, 0), dtype)
        stored = np.dtype(self.stored(operand))
        if stored == np.dtype(dtype):
            return f"R['{operand}']"
        return f"R['{operand}'].{'view' if stored.itemsize == np.dtype(dtype).itemsize else 'astype'}('{dtype}')"

    def stored(self, register: str) -> str:
        """The numpy dtype that keeps a register's bits."""
        declared = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if declared not in _STORED:
            raise PtxError(f"unknown register or symbol {register}")
        return _STORED[declared]

    def constant(self, value: float, dtype: str) -> str:
        name = f"k{len(self.constants)}"
        exact = np.float64(value) if isinstance(value, float) else np.uint64(value & 2**64 - 1)
        self.constants[name] = exact.astype(dtype)
        return name

    def write(self, register: Operand, value: str) -> list[str]:
        if not isinstance(register, str):
            raise self.unknown()
        if register == "_":
            return []
        target = f"R['{register}']"
        return [
            f"new = raw({value}, '{self.stored(register)}')",
            f"{target} = new if W is None else blend(W, new, R, '{register}')",
        ]

    def unknown(self) -> PtxError:
        return PtxError("the interpreter does not know this instruction; add it to tests/support/ptx/translate.py")
