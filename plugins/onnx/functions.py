"""The three plugin nodes as ONNX model-local functions, made for the model at hand."""

from collections.abc import Sequence

from onnx import FunctionProto, helper

from keysieve.plugins.contract import DOMAIN, LINEAR_ATTENTION, SCORE, SELECT, UPDATE, PluginNode
from keysieve.plugins.onnx.body import OPSET, Body
from keysieve.plugins.onnx.linear_attention import linear_attention_body
from keysieve.plugins.onnx.score import score_body
from keysieve.plugins.onnx.select import select_body
from keysieve.plugins.onnx.update import update_body


def update_function() -> FunctionProto:
    """KeySieveUpdate; `layer` stays an attribute, so one function serves every layer."""
    return _function(UPDATE, update_body(), [port.name for port in UPDATE.inputs])


def linear_attention_function() -> FunctionProto:
    """KeySieveLinearAttention, for any sizes."""
    return _function(LINEAR_ATTENTION, linear_attention_body(), [port.name for port in LINEAR_ATTENTION.inputs])


def score_function(
    layers: int, query_heads: int, kv_heads: int, policy: str, rotary_dim: int, interleaved: bool, rows: int
) -> FunctionProto:
    """KeySieveScore with one key input a layer; rows is J."""
    body = score_body(layers, query_heads, kv_heads, policy, rotary_dim, interleaved, rows)
    inputs = [port.name for port in SCORE.inputs[:-1]] + [f"key_{layer}" for layer in range(layers)]
    return _function(SCORE, body, inputs)


def select_function(
    layers: int, kv_heads: int, scope: str, sinks: int, recent: int, utility: bool = False
) -> FunctionProto:
    """KeySieveSelect for one scope and protection, with the input utility or without."""
    body = select_body(layers, kv_heads, scope, sinks, recent, utility)
    return _function(SELECT, body, [port.name for port in SELECT.inputs if utility or not port.optional])


def _function(node: PluginNode, body: Body, inputs: Sequence[str]) -> FunctionProto:
    return helper.make_function(
        DOMAIN,
        node.name,
        inputs,
        [port.name for port in node.outputs],
        body.nodes,
        opset_imports=[helper.make_opsetid("", OPSET)],
        attributes=[*node.attributes, "plugin_version", "plugin_namespace"],
    )
