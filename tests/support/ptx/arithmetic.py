"""PTX arithmetic that is not one numpy operator; every function works on whole arrays of lanes."""

import numpy as np

WARP = 32


def raw(value: np.ndarray, stored: str) -> np.ndarray:
    """The bits of a result as a register of numpy dtype `stored` keeps them; a narrower result is extended."""
    return value.view(stored) if value.dtype.itemsize == int(np.dtype(stored).itemsize) else value.astype(stored)


def shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Arithmetic for signed types, which numpy's >> is; a shift by all bits or more leaves 0 or the sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of 32-bit or 64-bit numbers."""
    if a.dtype.itemsize == 4:
        return ((a.astype(f"{a.dtype.kind}8") * b) >> 32).astype(a.dtype)
    x, y, low = a.view("u8"), np.asarray(b).view("u8"), np.uint64(0xFFFFFFFF)
    inner = (x >> 32) * (y & low) + ((x & low) * (y & low) >> 32)
    middle = (x & low) * (y >> 32) + (inner & low)
    high = (x >> 32) * (y >> 32) + (inner >> 32) + (middle >> 32)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.astype("u8").view(a.dtype)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero, as in C."""
    floor = np.where(b == 0, a.dtype.type(0), a // np.where(b == 0, b.dtype.type(1), b))
    return floor + ((floor < 0) & (floor * b != a)).astype(a.dtype)


def bit_field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of unsigned numbers: `length` bits from bit `start`."""
    mask = shift_left(np.ones_like(a), length) - a.dtype.type(1)
    return shift_right(a, start) & mask


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of the selector names one of the 8 bytes of (b, a), or with bit 3 its sign, repeated."""
    both = a.astype("u8") | (np.asarray(b).astype("u8") << 32)
    out = np.zeros_like(both)
    for place in range(4):
        nibble = (selector.astype("u8") >> (4 * place)) & 15
        byte = (both >> (8 * (nibble & 7))) & 255
        out |= np.where(nibble & 8, (byte >> 7) * 255, byte) << (8 * place)
    return out.astype("u4")


def lookup3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: bit (4 a + 2 b + c) of the table, for every bit."""
    out = np.zeros_like(a | b | c)
    for row in range(8):
        if int(table) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def to_bf16(a: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    bits = a.view("u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), 0x7FFF, rounded).astype("u2")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("u4") << 16).view("f4")


def to_integer(a: np.ndarray, dtype: str) -> np.ndarray:
    """A float that is whole already to an integer type: saturating, and NaN to 0."""
    limit = np.iinfo(dtype)
    return np.clip(np.where(np.isnan(a), 0, a).astype("f8"), limit.min, limit.max).astype(dtype)


def shuffle(mode: str, value: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """shfl.sync of values [n], n a multiple of 32: (values, whether the source lane was in range)."""
    lane = np.arange(len(value)) % WARP
    by, segment, limit = (np.asarray(part).astype("i8") & 31 for part in (by, np.asarray(clamp) >> 8, clamp))
    low, high = lane & segment, (lane & segment) | (limit & ~segment)
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
    valid = source >= high if mode == "up" else source <= high
    return value[np.arange(len(value)) - lane + np.where(valid, source, lane)], valid


def reduce_warp(value: np.ndarray, operator: np.ufunc) -> np.ndarray:
    """Every lane gets the reduction over its warp, in the type of the value."""
    return np.repeat(operator.reduce(value.reshape(-1, WARP), axis=1, dtype=value.dtype), WARP)


def ballot(vote: np.ndarray) -> np.ndarray:
    """Every lane gets its warp's votes, lane 0 in the lowest bit."""
    return reduce_warp(vote.astype("u4") << (np.arange(len(vote)) % WARP).astype("u4"), np.bitwise_or)
