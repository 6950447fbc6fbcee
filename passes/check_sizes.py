"""check_sizes: no size that may differ from step to step was replaced by a number on the way.

A pass may read a size where it should have asked for a node, and a shape rule of torch may take the example that it was
given for the only one. Such a graph is a valid program, and wrong for every other batch. So all nodes are run once more
on tensors without memory, with other sizes than those of the examples: what they give must have the shapes that the
graph says. Torch itself notices some such losses, see Graph.refresh; this one asks nobody.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.node import map_arg

from keysieve.errors import MatchError
from keysieve.passes.graph import Graph

# None of these is an example that capture or Graph.symbol gives. Few tokens, since some models have room for so many.
TOKENS, BATCH, OTHERS = 29, 401, 409
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def check_sizes(graph: Graph) -> None:
    """Check a rewritten graph that was captured with dynamic sizes; shapes that depend on data are left out.

    Raises MatchError that names the first node whose shape is right for one size alone.
    """
    graph.check_sizes_vary("a pass")
    names = [name for name in graph.sizes if name not in ("batch", "tokens")]
    numbers = {"tokens": TOKENS, "batch": BATCH} | {name: OTHERS + 2 * index for index, name in enumerate(names)}
    for name in ("batch", "tokens"):
        if name not in graph.sizes:
            raise MatchError(_refusal("input input_ids", f"it has no dynamic size {name!r}", numbers))
    symbols = {size.node.expr: numbers[name] for name, size in graph.sizes.items()}
    number = cache(lambda expression: expression.subs(symbols))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    found: dict[Node, Any] = {}
    for node in graph.ancestors(graph.outputs.values()):
        said: Any = node.meta["val"]
        if node.op == "placeholder":
            shape = _sizes(said, number)[0]
            if None not in shape:
                with mode:
                    found[node] = torch.empty(shape, dtype=said.dtype)
        elif callable(node.target) and all(used in found for used in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
            try:
                with mode:
                    found[node] = node.target(*args, **kwargs)
            except UNKNOWN:
                continue
            except Exception as error:  # torch raises many kinds; the cause stays attached
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise MatchError(_refusal(_where(node), f"it cannot run ({first})", numbers)) from error
            expected, real = _sizes(said, number), _sizes(found[node], number)
            if not _same(expected, real):
                raise MatchError(_refusal(_where(node), f"it makes {real}, and not {expected}", numbers))


def _where(node: Node) -> str:
    return f"node {node.name} ({node.target})"


def _refusal(where: str, what: str, numbers: dict[str, int]) -> str:
    sizes = ", ".join(f"{name} {number}" for name, number in numbers.items())
    return (
        f"{where} was made for one size alone: with {sizes}, {what}. The engine would be wrong for others, so it is "
        f"refused; it may be a shape rule of torch {torch.__version__}: compile with a torch that docs/models.md "
        "lists, or report the model with this message"
    )


def _sizes(value: Any, number: Callable[[Any], Any]) -> list[list[Any]]:
    """Of all tensors in a node's value, with numbers put in for the sizes; None for what depends on data."""
    return [[_size(size, number) for size in shape] for shape in _shapes(value)]


def _size(size: Any, number: Callable[[Any], Any]) -> int | None:
    if isinstance(size, int):
        return size
    found = number(size.node.expr)
    return int(found) if found.is_number else None


def _shapes(value: Any) -> Iterator[tuple[Any, ...]]:
    """Of all tensors in a node's value; a size counts as one."""
    if isinstance(value, torch.Tensor):
        yield tuple(value.shape)
    elif isinstance(value, (int, torch.SymInt)):
        yield (value,)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _shapes(one)


def _same(expected: list[list[Any]], real: list[list[Any]]) -> bool:
    if list(map(len, expected)) != list(map(len, real)):
        return False
    pairs = [pair for shapes in zip(expected, real, strict=True) for pair in zip(*shapes, strict=True)]
    return all(one == other or None in (one, other) for one, other in pairs)
