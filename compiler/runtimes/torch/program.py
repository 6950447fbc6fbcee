"""A program of `export.torch` as a module on a device: the list of calls becomes a torch.fx graph."""

import json
import operator
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

import keysieve.plugins.torch.in_place
import keysieve.plugins.torch.ops  # noqa: F401  (both register torch.ops.keysieve)
from keysieve.errors import BundleError

EVICTION = ("keysieve::score_at", "keysieve::select_")
# Which argument of an operation holds what it changes; it is run where that is read.
CHANGED = {"aten::copy_": 0, "aten::add_.Tensor": 0, "keysieve::update_": 5}


@dataclass(frozen=True)
class Input:
    """One input: numbers, names of sizes, such as "batch", and (n, name) for n times that."""

    name: str
    shape: tuple[int | str | tuple[int, str], ...]
    dtype: torch.dtype

    def sized(self, sizes: dict[str, int]) -> tuple[int, ...]:
        def number(size: int | str | tuple[int, str]) -> int:
            if isinstance(size, tuple):
                return size[0] * sizes[size[1]]
            return sizes[size] if isinstance(size, str) else size

        return tuple(map(number, self.shape))


@dataclass(frozen=True)
class Program:
    """module(*inputs) -> logits [B,N,V] and, where it evicts, evicted [B].

    inputs: those that it reads or changes, in its order. tables: the inputs that hold addresses, with the inputs whose
    addresses these are. heads: query heads that are scored, of all layers.
    """

    module: GraphModule
    inputs: list[Input]
    operations: frozenset[str]
    tables: dict[str, list[str]]
    heads: int


def read_program(file: Path, weights: dict[str, torch.Tensor], device: torch.device, evicts: bool = True) -> Program:
    """The program of a file.

    weights: by name; those that the program reads side by side are joined there. evicts: without it, nothing is scored
    and selected, for engines that hold every row.
    Raises BundleError where this torch lacks an operation.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    calls = content["calls"] if evicts else _without(content["calls"], EVICTION)
    outputs = [node for name, node in content["outputs"].items() if evicts or name == "logits"]
    calls, used = _needed(calls, outputs)
    inputs = [Input(i["name"], _shape(i["shape"]), getattr(torch, i["dtype"])) for i in content["inputs"]]
    inputs = [one for one in inputs if one.name in used]
    graph, root = Graph(), {}
    env: dict[str, Node] = {one.name: graph.placeholder(one.name) for one in inputs}
    for node, tensor in content["weights"].items():
        if node in used:
            name = tensor if isinstance(tensor, str) else _side_by_side(tensor, weights)
            attribute = "w_" + name.replace(".", "_")
            root[attribute] = weights[name]
            env[node] = graph.get_attr(attribute)

    def value(given: Any) -> Any:
        if isinstance(given, list):
            return [value(one) for one in given]
        if not isinstance(given, dict):
            return given
        ((kind, content),) = given.items()
        return device if kind == "device" else env[content] if kind == "node" else getattr(torch, content)

    for name, operation, args, kwargs in calls:
        target = _target(operation, file)
        env[name] = graph.call_function(target, tuple(map(value, args)), {k: value(v) for k, v in kwargs.items()})
    graph.output(tuple(env[name] for name in outputs))
    scores = [call[2] for call in calls if call[1] == EVICTION[0]]
    tables = {args[6]["node"]: _names(args[5]) for args in scores}
    heads = sum(len(args[5]) * args[8] for args in scores)
    return Program(GraphModule(root, graph), inputs, frozenset(call[1] for call in calls), tables, heads)


def _shape(sizes: list[Any]) -> tuple[int | str | tuple[int, str], ...]:
    return tuple(tuple(size) if isinstance(size, list) else size for size in sizes)


def _side_by_side(names: list[str], weights: dict[str, torch.Tensor]) -> str:
    """Put several weights into one in their place; returns its name."""
    joined = "+".join(names)
    if joined not in weights:
        weights[joined] = torch.cat([weights.pop(name) for name in names])
    return joined


def _without(calls: list[Any], operations: Collection[str]) -> list[Any]:
    """The calls but those of the operations, and of what is made of their results."""
    gone, kept = set[str](), []
    for call in calls:
        name, operation, args, kwargs = call
        if operation in operations or gone.intersection(_names([*args, *kwargs.values()])):
            gone.add(name)
        else:
            kept.append(call)
    return kept


def _needed(calls: list[Any], outputs: list[str]) -> tuple[list[Any], set[str]]:
    """The calls that make the outputs or change a cache, with what they need, and the names of all that they read.

    A state is changed only where one of them reads it: without eviction, nobody asks for centres or utilities.
    """
    used, kept = set(outputs), set[str]()
    grown = True
    while grown:
        grown = False
        for name, operation, args, kwargs in reversed(calls):
            changes = operation.partition(".")[0].endswith("_")
            changed = args[CHANGED.get(operation, 0)]
            root = changes and (operation not in CHANGED or changed["node"] in used)
            if name not in kept and (root or name in used):
                kept.add(name)
                used |= set(_names([*args, *kwargs.values()]))
                grown = True
    return [call for call in calls if call[0] in kept], used


def _names(values: Any) -> list[str]:
    if isinstance(values, list):
        return [name for value in values for name in _names(value)]
    return [values["node"]] if isinstance(values, dict) and "node" in values else []


def _target(operation: str, file: Path) -> Any:
    """ "aten::add.Tensor", "operator.add" -> the function."""
    library, _, name = operation.partition("::")
    try:
        if not name:
            module, _, name = operation.partition(".")
            return getattr({"operator": operator, "torch": torch}[module], name)
        packet, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, library), packet), overload or "default")
    except (AttributeError, KeyError) as error:
        raise BundleError(
            f"{file} needs the operation {operation}, which torch {torch.__version__} does not have; use the torch of "
            "the manifest's versions, or compile the bundle again here"
        ) from error
