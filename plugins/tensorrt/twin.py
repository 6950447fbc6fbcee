"""The plugins' shape, dtype and alias functions in Python, made from the contract; the C++ ones must agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from keysieve.kernels.triton.configuration import KernelConfiguration, needs_stats
from keysieve.plugins.contract import SELECT, PluginNode, Port, plan_shape

ALIGNMENT = 256  # bytes; of each part of a workspace
Shape = tuple[Any, ...]


def input_ports(node: PluginNode, inputs: int) -> list[Port]:
    """One port for each input: the variadic last one repeated, the optional one left out."""
    return [*node.inputs, *[node.inputs[-1]] * (inputs - len(node.inputs))][:inputs]


def output_shapes(node: PluginNode, inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> list[Shape]:
    """Shapes of the outputs for these inputs; sizes may be numbers or names."""
    sizes: dict[str, Any] = {}
    for port, shape in zip(input_ports(node, len(inputs)), inputs, strict=True):
        sizes.update(zip(port.shape.split(","), shape, strict=True))
    if node.inputs[-1].variadic:
        sizes["L"] = len(inputs) - len(node.inputs) + 1
    sizes["Hq"] = attributes.get("query_heads", sizes.get("Hq"))
    if node is SELECT:
        plan = plan_shape(attributes["scope"], sizes["L"], sizes["B"], attributes["kv_heads"], sizes["C"])
        sizes["Lp"], _, sizes["Hp"], _ = plan
    return [tuple(sizes[name] for name in port.shape.split(",")) for port in node.outputs]


def input_types(node: PluginNode, inputs: int, cache: str) -> list[str]:
    """Dtype of each input, the cache's being `cache`."""
    return [cache if port.dtype == "cache" else port.dtype for port in input_ports(node, inputs)]


def output_types(node: PluginNode, cache: str) -> list[str]:
    """Dtype of each output, the cache's being `cache`."""
    return [cache if port.dtype == "cache" else port.dtype for port in node.outputs]


def aliased_inputs(node: PluginNode) -> list[int]:
    """For each output the index of the input whose buffer it is, or -1."""
    names = [port.name for port in node.inputs]
    return [names.index(port.alias) if port.alias else -1 for port in node.outputs]


def select_workspace(model: KernelConfiguration, batch: int, capacity: int) -> int:
    """Bytes of workspace of KeySieveSelect: four float32 a head, and a 32-bit rank for every row of the plan."""
    stats = model.layers * batch * model.query_heads * 4 * 4 if needs_stats(model.scope) else 0
    ranks = model.plan_layers * batch * model.plan_heads * capacity * 4
    return sum(-(-part // ALIGNMENT) * ALIGNMENT for part in (stats, ranks))
