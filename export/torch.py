"""export for torch: the graph as a list of calls in JSON, the weights in safetensors.

The list names torch operations with their arguments, so it is read by any torch that has them, on any device:
{"inputs": [{"name", "shape", "dtype"}], "weights": {node: tensor or [tensors]},
"calls": [[node, operation, args, kwargs]], "outputs": {"logits": node, "evicted": node}}. In shapes, numbers and names
of sizes; in arguments, {"node": name}, {"dtype": name}, {"device": 0} for the one that it runs on, and plain values;
layouts and memory formats as dtypes.
"""

import json
import operator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.fx import Node

from keysieve.errors import ExportError
from keysieve.export.join_products import join_products
from keysieve.passes.graph import Graph
from keysieve.passes.in_place import in_place
from keysieve.passes.sum_rows import sum_rows

# Operations that other packages register -> ours, so that a run needs none of them.
OURS = {"transformers::grouped_mm_fallback": "keysieve::grouped_matmul"}


def export_torch(graph: Graph, program: Path, weights: Path, metadata: dict[str, str]) -> None:
    """Write a rewritten graph, whose caches are updated in place from here on, to two files.

    Raises ExportError where an argument of a node has no JSON form.
    """
    tensors = write_program(graph, program)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata)


def write_program(graph: Graph, file: Path) -> dict[str, torch.Tensor]:
    """The first of the two files alone; returns what belongs into the second, by name."""
    in_place(graph)
    sum_rows(graph)
    graph.close()
    sizes = _size_names(graph)
    names, stored = _weights(graph)
    content = {
        "inputs": [_input(name, node, sizes) for name, node in graph.inputs.items()],
        "weights": names,
        "calls": [_call(node) for node in graph.fx.nodes if node.op == "call_function"],
        "outputs": {name: node.name for name, node in graph.outputs.items()},
    }
    join_products(content, {node.name: tuple(tensor.shape) for node, tensor in graph.tensors.items()})
    file.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    return stored


def _size_names(graph: Graph) -> dict[str, str]:
    """Symbol -> the name of that size."""
    names = {str(size.node.expr): name for name, size in graph.symbols.items()}
    batch, tokens = graph.shape(graph.inputs["input_ids"])
    return names | {str(batch): "batch", str(tokens): "tokens"}


def _input(name: str, node: Node, sizes: dict[str, str]) -> dict[str, Any]:
    value = node.meta["val"]
    shape = [size if isinstance(size, int) else _size(size, sizes) for size in value.shape]
    return {"name": name, "shape": shape, "dtype": _name(value.dtype)}


def _size(size: Any, names: dict[str, str]) -> str | list[int | str]:
    """The name of a size, or [n, name] for n times that."""
    factor, symbol = size.node.expr.as_coeff_Mul()
    name = names[str(symbol)]
    return name if factor == 1 else [int(factor), name]


def _weights(graph: Graph) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Node -> name of its tensor, and the tensors; those that share their memory are stored once."""
    names: dict[str, str] = {}
    stored: dict[str, torch.Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    for node, spec in graph.specs.items():
        tensor = graph.tensors[node].detach()
        place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        name = first.setdefault(place, str(spec.target))
        names[node.name] = name
        stored[name] = tensor
    return names, stored


def _call(node: Node) -> list[Any]:
    args = [_value(node, arg) for arg in node.args]
    kwargs = {name: _value(node, value) for name, value in node.kwargs.items()}
    if _creates(node):
        kwargs["device"] = {"device": 0}
    return [node.name, _operation(node), args, kwargs]


def _creates(node: Node) -> bool:
    """Whether it makes a tensor out of numbers, which torch would put on a CPU."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
    return not takes_tensors and any(argument.name == "device" for argument in arguments)


def _operation(node: Node) -> str:
    """ "aten::add.Tensor" for an operation of a library, "operator.add" for one of Python, on sizes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return OURS.get(target.name(), target.name())
    name = getattr(target, "__name__", "")
    for module in (operator, torch):
        if getattr(module, name, None) is target:
            return f"{module.__name__}.{name}"
    raise ExportError(f"node {node.name}: the torch target has no form for {target}")


def _value(node: Node, value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    for kind in ("dtype", "layout", "memory_format"):
        if isinstance(value, getattr(torch, kind)):
            return {kind: _name(value)}
    if isinstance(value, torch.device):
        return {"device": 0}
    if isinstance(value, (list, tuple)):
        return [_value(node, one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ExportError(f"node {node.name} ({node.target}): the torch target has no form for the argument {value!r}")


def _name(value: Any) -> str:
    """torch.float32 -> "float32"."""
    return str(value).removeprefix("torch.")
