"""export to ONNX: one file for prefill and decode, opset 24, with the plugin nodes and their function bodies."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import FunctionProto
from onnxscript import values
from onnxscript.onnx_opset import opset24 as op

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.errors import ExportError
from keysieve.export.quantize import Quantized, quantize
from keysieve.export.translate import translate
from keysieve.passes.graph import Graph
from keysieve.passes.lower_attend import lower_attend
from keysieve.plugins.contract import DOMAIN, LINEAR_ATTENTION, NAMESPACE, SCORE, SELECT, UPDATE, PluginNode
from keysieve.plugins.onnx.functions import linear_attention_function, score_function, select_function, update_function

TENSOR_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)", "tensor(int64)"]
INSIDE = 256  # bytes of a tensor up to which it stands in the file of the graph
DIMENSIONS = {"input_ids": ("batch", "tokens"), "logits_at": ("batch", "wanted")}


def export_onnx(
    graph: Graph, path: Path, metadata: dict[str, str], inline: bool = False, weights: str | None = None
) -> Quantized | None:
    """Write the rewritten graph to `path` with its weights beside it in `<path>.data`.

    inline: put the function bodies in place of the plugin nodes, for runtimes that know no model-local functions.
    weights: "int8" or "int4" quantizes them, for ONNX Runtime; what that did is returned.
    Raises ExportError where a node has no ONNX form, or the file does not pass onnx.checker.
    """
    functions = _functions(graph)
    lower_attend(graph)
    program = graph.program()
    model = translate(program, list(graph.inputs), list(graph.outputs), _translations(inline))
    _simplify(model)
    _choose_overloads(model)
    _name_dimensions(model, {str(size.node.expr): name for name, size in graph.symbols.items()})
    model.metadata_props.update(metadata)
    model.producer_name = "keysieve"
    for function in functions:
        proto = ir.serde.deserialize_function(function)
        model.functions[proto.identifier()] = proto
    model.opset_imports[DOMAIN] = 1
    if inline:
        _inline(model)
    quantized = quantize(model, weights) if weights else None
    _save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: the exported graph fails onnx.checker: {error}") from error
    return quantized


def _save(model: ir.Model, path: Path) -> None:
    """Write the graph to `path` and its weights beside it; tensors of the same memory are written once."""
    first: dict[tuple[int, int], ir.Value] = {}
    twins: list[tuple[ir.Value, ir.Value]] = []
    for value in model.graph.initializers.values():
        array = getattr(value.const_value, "raw", None)
        if isinstance(array, np.ndarray) and array.nbytes > INSIDE:
            same = first.setdefault((array.ctypes.data, array.nbytes), value)
            if same is not value:
                twins.append((value, same))
                value.const_value = None  # not written
    ir.external_data.unload_from_model(model, path.parent, f"{path.name}.data", size_threshold_bytes=INSIDE)
    for value, same in twins:
        there: Any = same.const_value
        place = there.location, there.offset, there.length
        described: Any = {"dtype": value.dtype, "shape": value.shape, "name": value.name}
        value.const_value = ir.ExternalTensor(*place, **described, base_dir=path.parent)
    ir.save(model, path)


def _functions(graph: Graph) -> list[FunctionProto]:
    """Bodies made from the arguments of the graph's own nodes, for those that it has."""
    ops = torch.ops.keysieve
    functions = [update_function()] if graph.calls(ops.update.default) else []
    functions += [linear_attention_function()] if graph.calls(ops.linear_attention.default) else []
    scores, selects = graph.calls(ops.score.default), graph.calls(ops.select.default)
    for index, (score, select) in enumerate(zip(scores, selects, strict=True)):
        centre, keys = score.args[3], score.args[5]
        policy, query_heads, rotary_dim, interleaved = score.args[6:]
        scope, kv_heads, sinks, recent, *utility = select.args[5:]
        layers = len(keys)  # type: ignore[arg-type]
        rows = int(graph.shape(centre)[3])  # type: ignore[arg-type]
        made = [
            score_function(layers, query_heads, kv_heads, policy, rotary_dim, bool(interleaved), rows),  # type: ignore[arg-type]
            select_function(layers, kv_heads, scope, sinks, recent, bool(utility)),  # type: ignore[arg-type]
        ]
        for function in made:
            function.overload = _overload(index, len(scores))
        functions += made
    return functions


def _overload(index: int, nodes: int) -> str:
    """Which function of its name belongs to the index-th of so many nodes: "" where there is only one."""
    return str(index) if nodes > 1 else ""


def _choose_overloads(model: ir.Model) -> None:
    """Each score and select node gets the function of its own layers: they stand in the order of the groups."""
    for name in (SCORE.name, SELECT.name):
        nodes = [node for node in model.graph if node.op_type == name]
        for index, node in enumerate(nodes):
            node.overload = _overload(index, len(nodes))


# -- translation -----------------------------------------------------------------------------------------------------


def _translations(inline: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    update, linear_attention = (_plugin_op(node) for node in (UPDATE, LINEAR_ATTENTION))
    common = {"plugin_namespace": NAMESPACE}

    def attend(query: Any, key: Any, value: Any, mask: Any, *_: Any, scale: float, **__: Any) -> Any:
        return op.Attention(query, key, value, mask, scale=scale)[0]

    def attend_without_gqa(query: Any, key: Any, value: Any, mask: Any, *_: Any, scale: float, **__: Any) -> Any:
        """For runtimes whose Attention wants as many KV heads as query heads (OpenVINO): the G query heads of a KV
        head become rows of it, [B,Hq,S,D] -> [B,Hkv,G*S,D], which moves no data and repeats no K or V."""
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads == kv_heads:
            return attend(query, key, value, mask, scale=scale)
        rows = op.Reshape(query, op.Constant(value_ints=[0, kv_heads, -1, query.shape[3]]))
        tall_mask = op.Concat(*[mask] * (heads // kv_heads), axis=2)
        result = op.Attention(rows, key, value, tall_mask, scale=scale)[0]
        return op.Reshape(result, op.Constant(value_ints=[0, heads, -1, value.shape[3]]))

    def keysieve_update(
        key_new: Any, value_new: Any, length: Any, plan: Any, keep: Any, key: Any, value: Any, layer: int
    ) -> Any:
        return update(
            key_new, value_new, length, plan, keep, key, value, layer=layer, plugin_version=UPDATE.version, **common
        )

    def keysieve_score(
        length: Any,
        limit: Any,
        position: Any,
        centre: Any,
        weight: Any,
        keys: Sequence[Any],
        policy: str,
        query_heads: int,
        rotary_dim: int,
        interleaved: int,
    ) -> Any:
        return _plugin_op(SCORE, len(keys))(
            length, limit, position, centre, weight, *keys,
            policy=policy, query_heads=query_heads, rotary_dim=rotary_dim, interleaved=interleaved,
            plugin_version=SCORE.version, **common,
        )  # fmt: skip

    def keysieve_select(
        scores: Any,
        length: Any,
        limit: Any,
        budget: Any,
        pinned: Any,
        scope: str,
        kv_heads: int,
        sinks: int,
        recent: int,
        utility: Any = None,
    ) -> Any:
        tensors = [value for value in (scores, length, limit, budget, pinned, utility) if value is not None]
        return _plugin_op(SELECT, inputs=len(tensors))(
            *tensors,
            scope=scope, kv_heads=kv_heads, sinks=sinks, recent=recent, plugin_version=SELECT.version, **common,
        )  # fmt: skip

    def keysieve_linear_attention(
        query: Any, key: Any, value: Any, decay: Any, rate: Any, state: Any, delta: int, layer: int
    ) -> Any:
        tensors = query, key, value, decay, rate, state
        return linear_attention(*tensors, delta=delta, plugin_version=LINEAR_ATTENTION.version, **common)

    ops = torch.ops.keysieve
    return {
        ops.linear_attention.default: keysieve_linear_attention,
        torch.ops.aten.scaled_dot_product_attention.default: attend_without_gqa if inline else attend,
        ops.update.default: keysieve_update,
        ops.score.default: keysieve_score,
        ops.select.default: keysieve_select,
        **_mixture_of_experts(),
    }


def _mixture_of_experts() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The grouped product in which transformers runs experts; ONNX has none, so each expert multiplies its rows."""

    def grouped_matmul(rows: Any, weight: Any, ends: Any) -> Any:
        """rows [N,I] in the order of experts, weight [E,I,O], ends [E]: where each one's rows end -> [N,O]."""
        first_axis = op.Constant(value_ints=[0])
        ends = op.Cast(ends, to=ir.DataType.INT64)
        start, parts = first_axis, []
        for expert in range(weight.shape[0]):
            end = op.Gather(ends, op.Constant(value_ints=[expert]))
            matrix = op.Gather(weight, op.Constant(value_int=expert))
            parts.append(op.MatMul(op.Slice(rows, start, end, first_axis), matrix))
            start = end
        return op.Concat(*parts, axis=0)

    library = torch.ops.transformers  # registered by transformers with the models that use it
    return {library.grouped_mm_fallback.default: grouped_matmul} if hasattr(library, "grouped_mm_fallback") else {}


def _plugin_op(node: PluginNode, layers: int = 0, inputs: int | None = None) -> values.Op:
    """The node as an operator onnxscript can call, from its description in the contract, with its first inputs alone.

    onnxscript takes a variadic last input for a repetition of all inputs, so it is written out for so many layers.
    """
    schema = onnx.defs.OpSchema
    ports = node.inputs[:inputs]
    names = [[f"{p.name}_{layer}" for layer in range(layers)] if p.variadic else [p.name] for p in ports]
    parameters = [schema.FormalParameter(name, f"T{name}") for group in names for name in group]
    outputs = [schema.FormalParameter(p.name, f"T{p.name}") for p in node.outputs]
    types = {int: schema.AttrType.INT, str: schema.AttrType.STRING}
    attributes = {**node.attributes, "plugin_version": str, "plugin_namespace": str}
    return values.Op(
        values.Opset(DOMAIN, 1),
        node.name,
        schema(
            node.name,
            DOMAIN,
            1,
            inputs=parameters,
            outputs=outputs,
            type_constraints=[(parameter.type_str, TENSOR_TYPES, "") for parameter in (*parameters, *outputs)],
            attributes=[schema.Attribute(name, types[kind]) for name, kind in attributes.items()],
        ),
    )


# -- finishing -------------------------------------------------------------------------------------------------------


def _simplify(model: ir.Model) -> None:
    """Remove what the translation repeats: equal constants, equal subexpressions, identities, unused nodes."""
    from onnx_ir.passes import common

    for step in (
        common.InlinePass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
    ):
        step(model)


def _name_dimensions(model: ir.Model, names: dict[str, str]) -> None:
    """Rename torch's dimension symbols to batch, tokens, wanted, and those of the caches by `names`."""
    for value in model.graph.inputs:
        for size, name in zip(value.shape or (), DIMENSIONS.get(value.name or "", ()), strict=False):
            if name and isinstance(size, ir.SymbolicDim) and size.value:
                names[size.value] = name
    everything = [*model.graph.inputs, *model.graph.outputs]
    everything += [output for node in model.graph for output in node.outputs]
    for value in everything:
        if value.shape is None:
            continue
        sizes = [names.get(str(s.value), s.value) if isinstance(s, ir.SymbolicDim) else s for s in value.shape]
        value.shape = ir.Shape(sizes)


def _inline(model: ir.Model) -> None:
    from onnx_ir.passes import common

    common.InlinePass()(model)
    del model.opset_imports[DOMAIN]
