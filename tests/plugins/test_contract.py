"""The torch ops and the ONNX functions have the contract's names, inputs, outputs and shapes."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.kernels import SCOPES, reference
from keysieve.plugins.contract import DOMAIN, NODES, SCORE, SELECT, UPDATE, plan_shape
from keysieve.plugins.onnx.functions import score_function, select_function, update_function

SIZES = {"B": 3, "S": 2, "C": 7, "L": 2, "Hq": 4, "Hkv": 2, "D": 6, "Dv": 5, "R/2": 2, "J": 3}
DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
OPS = {node.name: getattr(torch.ops.keysieve, node.name.removeprefix("KeySieve").lower()).default for node in NODES}
ATTRIBUTES = {
    "layer": 1,
    "policy": "trig",
    "query_heads": SIZES["Hq"],
    "rotary_dim": 4,
    "interleaved": 1,
    "kv_heads": SIZES["Hkv"],
    "sinks": 1,
    "recent": 1,
}


def shape_of(port, scope):
    lp, _, hp, _ = plan_shape(scope, SIZES["L"], None, SIZES["Hkv"], None)
    sizes = SIZES | {"Lp": lp, "Hp": hp, "1": 1, "L*B": SIZES["L"] * SIZES["B"]}
    return [sizes[name] for name in port.shape.split(",")]


def example(node, scope, dtype):
    """Positional arguments of the torch op, by the contract's inputs and attributes; optional ones come last."""
    torch.manual_seed(0)
    arguments = []
    for port in node.inputs:
        kind = dtype if port.dtype == "cache" else DTYPES[port.dtype]
        shape = shape_of(port, scope)
        one = torch.randn(shape).to(kind) if kind.is_floating_point else torch.ones(shape, dtype=kind)
        arguments.append([one] * SIZES["L"] if port.variadic else one)
    attributes = [(ATTRIBUTES | {"scope": scope})[name] for name in node.attributes]
    return arguments[: len(node.required)] + attributes + arguments[len(node.required) :]


def results(op, arguments):
    out = op(*arguments)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_torch_op_gives_the_contracts_outputs_real_and_fake(node, scope, dtype):
    arguments = example(node, scope, dtype)
    real = results(OPS[node.name], arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [
            [mode.from_tensor(a) for a in argument]
            if isinstance(argument, list)
            else mode.from_tensor(argument)
            if isinstance(argument, torch.Tensor)
            else argument
            for argument in arguments
        ]
        fake = results(OPS[node.name], faked)
    assert len(real) == len(fake) == len(node.outputs)
    for port, value, imagined in zip(node.outputs, real, fake, strict=True):
        assert list(value.shape) == list(imagined.shape) == shape_of(port, scope)
        assert value.dtype == imagined.dtype == (dtype if port.dtype == "cache" else DTYPES[port.dtype])


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_torch_op_passes_torchs_own_checks(node):
    for scope in SCOPES:
        torch.library.opcheck(OPS[node.name], tuple(example(node, scope, torch.float32)))


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_torch_op_and_reference_take_the_contracts_arguments_in_order(node):
    names = [f"{port.name}s" if port.variadic else port.name for port in node.required] + list(node.attributes)
    names += [port.name for port in node.inputs if port.optional]
    kinds = {int: "int", str: "str"}
    schema = OPS[node.name]._schema
    assert [argument.name for argument in schema.arguments] == names
    for argument in schema.arguments[len(node.required) : len(node.required) + len(node.attributes)]:
        assert str(argument.type) == kinds[node.attributes[argument.name]]
    kernel = getattr(reference, node.name.removeprefix("KeySieve").lower())
    assert list(inspect.signature(kernel).parameters) == names


def test_torch_ops_equal_the_reference():
    for node in NODES:
        arguments = example(node, "per_layer_per_head", torch.float32)
        kernel = getattr(reference, node.name.removeprefix("KeySieve").lower())
        for found, wanted in zip(results(OPS[node.name], arguments), results(kernel, arguments), strict=True):
            assert torch.equal(found, wanted)


def test_every_alias_names_an_input_of_the_same_shape_and_dtype():
    for node in NODES:
        inputs = {port.name: port for port in node.inputs}
        for port in node.outputs:
            if port.alias is not None:
                aliased = inputs[port.alias]
                assert (aliased.shape, aliased.dtype) == (port.shape, port.dtype)
        assert not any(port.variadic for port in (*node.inputs[:-1], *node.outputs)), "only the last input may vary"


@pytest.mark.parametrize(
    ("node", "function"),
    [
        (UPDATE, update_function()),
        (SCORE, score_function(3, 4, 2, "trig", 8, True, 2)),
        (SELECT, select_function(3, 2, "per_head", 4, 8)),
        (SELECT, select_function(3, 2, "per_head", 4, 8, utility=True)),
    ],
    ids=lambda value: value.name,
)
def test_onnx_function_has_the_contracts_inputs_outputs_and_attributes(node, function):
    names = [f"{p.name}_{layer}" for p in node.inputs if p.variadic for layer in range(3)]
    ports = node.inputs if "utility" in function.input else node.required
    assert list(function.input) == [p.name for p in ports if not p.variadic] + names
    assert list(function.output) == [p.name for p in node.outputs]
    assert set(function.attribute) == {*node.attributes, "plugin_version", "plugin_namespace"}
    assert (function.domain, function.name) == (DOMAIN, node.name)
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", 24)]
    made = {name for inner in function.node for name in inner.output}
    assert set(function.output) <= made


def test_plan_is_shared_by_scope():
    assert plan_shape("per_layer_per_head", 5, "B", 3, "C") == (5, "B", 3, "C")
    assert plan_shape("per_head", 5, "B", 3, "C") == (1, "B", 3, "C")
    assert plan_shape("union", 5, "B", 3, "C") == (1, "B", 1, "C")


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"chunk": 4}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1, 0, 2])}]
)
def test_attention_op_is_causal_attention_with_every_option(options):
    """The op that capture leaves in a graph, against softmax(q k^T) v written out."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 5)
    window, chunk = options.get("window", 0), options.get("chunk", 0)
    softcap, sinks = options.get("softcap", 0.0), options.get("sinks")
    found = torch.ops.keysieve.attention(query, key, value, sinks, None, 0.3, window, chunk, softcap, 0)
    for batch in range(2):
        for head in range(4):
            for token in range(6):
                first = max(0, token + 1 - window) if window else token - token % chunk if chunk else 0
                logits = key[batch, head // 2, first : token + 1] @ query[batch, head, token] * 0.3
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                weights = logits.exp()
                total = weights.sum() + (sinks[head].exp() if sinks is not None else 0)
                expected = (weights / total) @ value[batch, head // 2, first : token + 1]
                torch.testing.assert_close(found[batch, head, token], expected, rtol=1e-5, atol=1e-6)
    arguments = (query, key, value, sinks, None, 0.3, window, chunk, softcap, 0)
    torch.library.opcheck(torch.ops.keysieve.attention.default, arguments)
