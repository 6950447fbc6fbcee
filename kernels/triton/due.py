"""What all programs of score and select begin with: whether there is work, and which part of it is whose."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton compiles these functions; their values have no types of Python.

import triton
import triton.language as tl

SEQUENCES = tl.constexpr(32)  # looked at together


@triton.jit
def any_due(length, limit, batch):
    """Whether some sequence has reached its limit."""
    due = tl.zeros((SEQUENCES,), tl.int32)
    for first in range(0, batch, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        held = tl.load(length + sequence, mask=sequence < batch, other=0)
        due += (held >= tl.load(limit + sequence, mask=sequence < batch, other=1)).to(tl.int32)
    return tl.sum(due, axis=0) > 0


@triton.jit
def rounds(part, parts):
    """How many of `parts` fall to the program whose first one is `part`, if all take them in turns."""
    return tl.maximum(tl.cdiv(parts - part, tl.num_programs(0)), 0)
