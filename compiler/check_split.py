"""check_split: a text that is fed in two steps gives what it gives in one.

The graph is captured without a cache. So an operation that looks at other tokens is right only where its past is
carried from step to step: in attention over the cache, and in the states of carry_states. Any other mixing of tokens
would match, and go wrong as soon as a text is split. Therefore the rewritten graph is run on a short random text both
ways, with the model's weights, and what reaches the cache of each layer is compared. What looks back further than that
text is long is not seen.

It runs in float32, whatever the dtype of the engine, where rounding is far from what a mixing of tokens does. Only a
router of experts can turn rounding into more, where two experts are as good for a token; so a difference counts if
every text shows one.
"""

import torch
from torch import Tensor
from torch.fx import Node

from keysieve.errors import MatchError
from keysieve.passes.check_sizes import check_sizes
from keysieve.passes.graph import Graph
from keysieve.plugins.contract import ROW_STATES

STEPS = (21, 27)  # tokens
TEXTS = 3
TOLERANCE = 1e-3  # of what tells the tokens apart; rounding leaves 1e-6
UNTOUCHED = ("plan", "keep", "centre", "magnitude", *ROW_STATES)  # state that matters only when something is evicted


def check_split(graph: Graph, numbers: list[int]) -> None:
    """Check a rewritten graph; numbers: what the model calls its layers with attention.

    Raises MatchError that names the first layer whose new keys or values depend on how a text is split. Before that,
    sizes are checked: one sequence is all that is run here, so a batch that was fixed would go unnoticed.
    """
    check_sizes(graph)
    for seed in range(TEXTS):
        layer = first_difference(graph, len(numbers), seed)
        if layer is None:
            return
        refusal = _refusal(numbers, layer)
    raise refusal


def _refusal(numbers: list[int], layer: int) -> MatchError:
    what = f"keys and values of layer {numbers[layer]}" if layer < len(numbers) else "logits"
    where = f"behind the attention of layer {numbers[layer - 1]}" if layer else "before its attention"
    return MatchError(
        f"the {what} depend on how a text is split into steps: something {where} mixes tokens, and the engine does not "
        "carry its past (it does so for attention, causal convolutions and linear attention); such a layer needs a "
        "state of its own (passes/carry_states.py)"
    )


@torch.no_grad()
def first_difference(graph: Graph, layers: int, seed: int) -> int | None:
    """The first layer that gets other keys or values when a text is split, from 0; `layers` for the logits."""
    updates = [_first_update(graph, layer) for layer in range(layers)]
    watched = [node.args[place] for node in updates for place in (0, 1)]
    watched.append(graph.outputs["logits"])
    vocabulary = int(graph.shape(watched[-1])[2])  # type: ignore[arg-type]
    text = torch.randint(vocabulary, (1, sum(STEPS)), generator=torch.Generator().manual_seed(seed))
    (whole,) = _read(graph, [text], watched)  # type: ignore[arg-type]
    parts = _read(graph, list(text.split(STEPS, 1)), watched)  # type: ignore[arg-type]
    for index, (expected, *found) in enumerate(zip(whole, *parts, strict=True)):
        tokens = expected.dim() - 2
        spread = (expected - expected.mean(tokens, keepdim=True)).norm()
        if not (torch.cat(found, tokens) - expected).norm() <= TOLERANCE * spread:  # so that NaN is a difference
            return index // 2
    return None


def _first_update(graph: Graph, layer: int) -> Node:
    """What updates the cache of a layer; of one of its parts, since what reaches all parts is made of the same."""
    names = (name for name in graph.outputs if name.startswith((f"key_{layer}_next", f"key_{layer}_")))
    return graph.outputs[next(names)].args[0]  # type: ignore[return-value]


def _read(graph: Graph, steps: list[Tensor], watched: list[Node]) -> list[list[Tensor]]:
    """Feed [1,S] tokens a step, from an empty cache; returns the watched values of every step."""
    state = {name: _start(graph, node) for name, node in graph.inputs.items()}
    carried = [name for name in state if f"{name}_next" in graph.outputs and not name.startswith(UNTOUCHED)]
    wanted = [*watched, *(graph.outputs[f"{name}_next"] for name in carried)]
    results = []
    for tokens in steps:
        size = tokens.shape[1]
        state |= {"input_ids": tokens, "logits_at": torch.arange(size)[None], "count": torch.tensor([size]).int()}
        given = {graph.inputs[name]: value for name, value in state.items()}
        values = graph.evaluate_all(wanted, given, torch.float32)
        results.append(values[: len(watched)])
        state |= dict(zip(carried, values[len(watched) :], strict=True))
        state["position"] = state["position"] + size
    return results


def _start(graph: Graph, node: Node) -> Tensor:
    """Zeros for one sequence, with room for the whole text; no plan waits."""
    dtype = node.meta["val"].dtype
    numbers = {size.node.expr: 1 if name == "batch" else sum(STEPS) for name, size in graph.sizes.items()}
    shape = [size if isinstance(size, int) else int(size.node.expr.subs(numbers)) for size in graph.shape(node)]
    return torch.full(
        shape, -1 if node.name.startswith("keep") else 0, dtype=torch.float32 if dtype.is_floating_point else dtype
    )
