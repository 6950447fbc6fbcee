"""What an attention mask lets a token see of its past: everything, a sliding window, or its own chunk.

The mask is evaluated, not recognised by its operations: on positions around every multiple of every number that
occurs in it, so that a window of 100,000 tokens costs no more than one of 10.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from keysieve.kernels.reference import visible
from keysieve.passes.graph import CANNOT_EVALUATE, Graph

aten = torch.ops.aten
LONGEST = 1 << 22  # tokens: further numbers in a mask are no windows (-2^63, the least float, ...)
LONGEST_MATRIX = 16384  # tokens, for masks that can only be evaluated as a whole


@dataclass(frozen=True)
class Span:
    """window: a token sees itself and window - 1 before it; chunk: those of its own chunk; 0 for no such limit."""

    window: int = 0
    chunk: int = 0


def mask_span(graph: Graph, mask: Node) -> Span | str:
    """The span of a causal mask [..., S, S] (bool, or added to the logits), or the reason why it has none."""
    if mask in graph.depends_on([graph.inputs["input_ids"]]):
        return "the attention mask depends on the tokens"
    numbers = {0}
    for node in graph.ancestors([mask]):
        numbers |= {abs(arg) for arg in node.args if isinstance(arg, int) and not isinstance(arg, bool)}
    numbers = {number for number in numbers if number <= LONGEST}
    rows = _rows(numbers)
    try:
        seen = _at(graph, mask, rows)
    except CANNOT_EVALUATE:
        if max(numbers) > LONGEST_MATRIX:
            return f"the attention mask has a window of up to {max(numbers)} tokens, too long to be verified"
        rows = torch.arange(max(numbers) + 8)
        try:
            seen = _whole(graph, mask, len(rows))
        except CANNOT_EVALUATE as error:
            return f"the attention mask cannot be evaluated alone: {error}"
    windows = [Span(window=size) for number in sorted(numbers) for size in (number, number + 1)]
    for span in (*windows, *(Span(chunk=number) for number in sorted(numbers))):
        if torch.equal(seen, visible(rows[:, None], rows, span.window, span.chunk)):
            return span
    return "the attention mask is neither causal nor a causal sliding window or chunk"


def _rows(numbers: set[int]) -> torch.Tensor:
    """Positions [n] at which a mask made with these numbers can change, and where it must not."""
    around = {multiple * number + offset for number in numbers for multiple in (1, 2, 3) for offset in range(-2, 3)}
    rows = {row for row in around | set(range(12)) if row >= 0}
    return torch.tensor(sorted(rows | {max(rows) + 7}))


def _at(graph: Graph, mask: Node, rows: torch.Tensor) -> torch.Tensor:
    """[n,n] bool: the mask between the tokens at `rows`, for masks that compare indices or positions of two tokens."""
    batch, tokens = (str(size) for size in graph.shape(graph.inputs["input_ids"]))
    while mask.target is aten.expand.default:
        mask = mask.args[0]  # type: ignore[assignment]
    given: dict[Node, torch.Tensor] = {}
    indexed = False
    for node in graph.ancestors([mask]):
        counts = node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)
        size = str(graph.shape(node)[0]) if counts else ""
        if size in (batch, tokens):
            given[node] = rows if size == tokens else torch.zeros(1, dtype=torch.long)
            indexed |= size == tokens
    # With indices, positions are looked up by them, so all must be there; without, they are compared themselves.
    positions = torch.arange(int(rows[-1]) + 1) if indexed else rows
    given[graph.inputs["position_ids"]] = positions[None]
    return _matrix(graph.evaluate(mask, given), len(rows))


def _whole(graph: Graph, mask: Node, size: int) -> torch.Tensor:
    """[size,size] bool: the mask of a text of that many tokens."""
    given = {
        graph.inputs["input_ids"]: torch.zeros(1, size, dtype=torch.long),
        graph.inputs["position_ids"]: torch.arange(size)[None],
    }
    return _matrix(graph.evaluate(mask, given), size)


def _matrix(seen: torch.Tensor, size: int) -> torch.Tensor:
    seen = seen if seen.dtype == torch.bool else seen > -1e4
    if tuple(seen.shape[-2:]) != (size, size):
        raise ValueError(f"it has shape {list(seen.shape)}")
    every = seen.reshape(-1, size, size)
    if not bool((every == every[:1]).all()):
        raise ValueError("it differs from head to head, or from sequence to sequence")
    return every[0]
