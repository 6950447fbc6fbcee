"""torch_steps: torch.onnx.export without its detours.

torch.onnx.export runs the whole program on fake tensors three times before it translates a node: twice to decompose
it, once to insert casts where dtypes are mixed. Nearly all nodes of a captured decoder need neither. So here the
program is decomposed only where it holds an operation that needs it, only the nodes that mix dtypes are run again,
and the table of translations is built once. The steps are torch's own; they have no public name, so a torch that
keeps them elsewhere makes the import of this file fail, and translate goes the long way.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import version_converter
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.traceback import preserve_node_meta
from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program
from torch.onnx._internal.exporter._fx_passes import decompose_with_registry, remove_assertion_nodes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import (
    TypePromotionTable,
    _TypePromotionInterpreter,
    get_type_promotion_rule,
)

from keysieve.plugins.onnx.body import OPSET


def export(program: ExportedProgram, translations: Mapping[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
    """What torch.onnx.export makes of the program with that custom translation table, without optimization."""
    registry = _registry()
    for target, function in translations.items():
        registry.register_op(target, function)
    program = _decomposed(program, registry)
    _write_as_floats(program.graph)
    _promote(program.graph_module)
    model = _exported_program_to_onnx_program(program, registry=registry).model
    version_converter.convert_version(model, OPSET, fallback=True)
    return model


def _registry() -> ONNXRegistry:
    """A copy of torch's own translations."""
    torchlib, registry = _torchlib(), ONNXRegistry()
    registry._opset_version = torchlib.opset_version
    registry.functions = {target: list(found) for target, found in torchlib.functions.items()}
    return registry


@functools.cache
def _torchlib() -> ONNXRegistry:
    torchlib = ONNXRegistry.from_torchlib(opset_version=OPSET)
    # A reshape is decomposed to a view, which takes a size of 0 for one, where ONNX would copy the input's size.
    torchlib.functions["aten::reshape"] = torchlib.functions["aten::view"]
    return torchlib


def _decomposed(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
    """The program itself where every operation has a translation and writes to none of its inputs."""
    remove_assertion_nodes(program.graph_module)
    _write_to_nothing(program.graph)
    operations = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if all(registry.is_registered(target) and not target._schema.is_mutable for target in operations):
        return program
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = decompose_with_registry(program, registry)
    remove_assertion_nodes(program.graph_module)
    return program


def _write_to_nothing(graph: torch.fx.Graph) -> None:
    """x.op_(y) becomes x = x.op(y) where x is a result of the graph that no view made before it looks at."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        packet, written = node.target.overloadpacket, node.args[0]
        twin = getattr(getattr(torch.ops, node.target.namespace), packet.__name__.removesuffix("_"))
        earlier = [user for user in written.users if user < node]
        if twin is packet or not hasattr(twin, node.target._overloadname):
            continue
        if any(map(_is_view, [written, *earlier])) or not _keeps_dtype(node):
            continue
        node.target = getattr(twin, node.target._overloadname)
        written.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)


def _is_view(node: Node) -> bool:
    """Whether it may share memory with its inputs."""
    source = node.args[0] if node.target is operator.getitem else node
    operation = source.target if isinstance(source, Node) else None
    if not isinstance(operation, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in operation._schema.returns)


def _keeps_dtype(node: Node) -> bool:
    """Whether all tensors but indices have the dtype of the first, so that the result has it without being cast."""
    arguments = zip(node.target._schema.arguments, node.args, strict=False)  # type: ignore[union-attr]
    tensors = [value for argument, value in arguments if not argument.name.startswith("ind")]
    dtypes = {value.meta["val"].dtype for value in tensors if isinstance(value, Node) and "val" in value.meta}
    return len(dtypes) == 1


def _write_as_floats(graph: torch.fx.Graph) -> None:
    """x + 1 becomes x + 1.0 where x holds floats: the same, and torch 2.11 stumbles when it promotes a weight's 1."""
    aten = torch.ops.aten
    arithmetic = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
    for node in graph.nodes:
        if node.target in arithmetic and type(node.args[1]) is int and isinstance(node.args[0], Node):
            value = node.args[0].meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                node.update_arg(1, float(node.args[1]))


class _Promotion(_TypePromotionInterpreter):
    """Inserts the casts that torch makes implicitly; a node that needs none keeps the fake value it has."""

    def run_node(self, n: Node) -> Any:
        rule = get_type_promotion_rule(n, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(n):
                self._maybe_promote_node(n, rule)
        return n.meta.get("val")


def _promote(module: torch.fx.GraphModule) -> None:
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    fake_mode: Any = detect_fake_mode(values)
    with fake_mode, torch._dispatch.python.enable_python_dispatcher(), preserve_node_meta():
        _Promotion(module, _promotions()).run(*values)


@functools.cache
def _promotions() -> TypePromotionTable:
    return TypePromotionTable()
