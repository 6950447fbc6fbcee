"""join_products: in a program for torch, products of the same activations become one.

    x -> linear(q), x -> linear(k), x -> linear(v)
becomes
    x -> linear(q + k + v) -> three slices

A GPU reads one large matrix faster than several small ones, and launches one kernel. The weights stay in the file as
they are; who loads the program puts them side by side.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

LINEAR = "aten::linear"
ALIGNED = 8  # results of a slice begin at multiples of 16 bytes


def join_products(content: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Change a program, see keysieve.export.torch: `weights` then names a list of tensors for a joined node.

    shapes: of the weights, by node.
    """
    calls, weights = content["calls"], content["weights"]
    readers = Counter(name for call in calls for name in _nodes(call[2]) + _nodes(list(call[3].values())))
    shared = Counter(weights.values())  # tied tensors have several nodes
    alone = {node for node, tensor in weights.items() if readers[node] == shared[tensor] == 1}
    alike: dict[tuple[str, int], list[Any]] = {}
    for call in calls:
        if call[1] != LINEAR or not all(isinstance(one, dict) and one.get("node") in alone for one in call[2][1:]):
            continue
        if shapes[call[2][1]["node"]][0] % ALIGNED == 0:
            alike.setdefault((call[2][0]["node"], len(call[2])), []).append(call)
    for members in alike.values():
        if len(members) > 1:
            _join(content, members, shapes)


def _join(content: dict[str, Any], members: list[Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    first, together = members[0], f"{members[0][0]}_together"
    arguments = [first[2][0]]
    for place in range(1, len(first[2])):
        parts = [call[2][place]["node"] for call in members]
        joined = "_".join(parts)
        content["weights"][joined] = [content["weights"].pop(part) for part in parts]
        arguments.append({"node": joined})
    start, slices = 0, []
    for call in members:
        end = start + shapes[call[2][1]["node"]][0]
        slices.append([call[0], "aten::slice.Tensor", [{"node": together}, -1, start, end], {}])
        start = end
    at = content["calls"].index(first)
    content["calls"] = [call for call in content["calls"] if call not in members]
    content["calls"][at:at] = [[together, LINEAR, arguments, {}], *slices]


def _nodes(values: list[Any]) -> list[str]:
    found = [value for value in values if isinstance(value, dict) and "node" in value]
    nested = [name for value in values if isinstance(value, list) for name in _nodes(value)]
    return [value["node"] for value in found] + nested
