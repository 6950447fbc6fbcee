import pytest
import torch

from keysieve.compiler.capture import capture
from keysieve.errors import MatchError
from support.graphs import ToyDecoder, graph_of, match, matched, run
from support.tiny_models import tiny_model

aten = torch.ops.aten


@pytest.fixture
def toy():
    return graph_of(ToyDecoder(lambda query, key, positions: (query * positions[:, None, :, None], key)))


GIVEN = {"input_ids": torch.randint(3, 300, (2, 7)), "position_ids": torch.arange(7).repeat(2, 1)}


def test_symbol_is_one_dynamic_size_of_its_own(toy):
    capacity = toy.symbol("C")
    batch, tokens = toy.shape(toy.inputs["input_ids"])
    assert toy.symbol("C") is capacity and str(toy.symbol("N")) != str(capacity)
    assert not isinstance(capacity, int) and str(capacity) not in {str(batch), str(tokens)}
    node = toy.input("rows", (batch, capacity), torch.float32)
    with toy.before(toy.output_node):
        toy.outputs["total"] = toy.call(aten.sum.dim_IntList, node, [1])
        toy.outputs["twice"] = toy.call(aten.cat.default, [node, node], 1)
    assert str(toy.shape(toy.outputs["twice"])[1]) == f"2*{capacity}"
    for rows in (1, 5, 11):
        out = run(toy, GIVEN | {"rows": torch.ones(2, rows)})
        assert out["total"].tolist() == [rows, rows] and out["twice"].shape == (2, 2 * rows)


@pytest.fixture
def asks_for_numbers():
    """An operation of others, whose form in C++ asks a tensor for numbers and whose form in Python does not."""
    name, composite = "keysieve_test::doubled", torch._C.DispatchKey.CompositeImplicitAutograd
    with torch.library._scoped_library("keysieve_test", "FRAGMENT") as library:
        library.define("doubled(Tensor x) -> Tensor")
        torch.library.impl(name, "CompositeImplicitAutograd", lib=library)(lambda x: x.new_empty([int(x.shape[0]), 2]))
        operation = torch.ops.keysieve_test.doubled.default
        yield operation, lambda: operation.py_impl(composite)(lambda x: x.new_empty([x.shape[0], 2]))


def test_fakes_come_from_the_forms_in_python(toy, asks_for_numbers):
    """As those of torch.export; in C++, linear asks for numbers with torch 2.11."""
    operation, also_in_python = asks_for_numbers
    also_in_python()
    with toy.before(toy.output_node):
        made = toy.call(operation, toy.outputs["logits"])
    assert list(toy.shape(made)) == [toy.shape(toy.inputs["input_ids"])[0], 2]
    toy.program()


def test_a_fake_that_fixes_a_size_is_refused(toy, asks_for_numbers):
    with toy.before(toy.output_node):
        toy.call(aten.neg.default, toy.outputs["logits"])
        words = r"node doubled_default \(keysieve_test.doubled.default\) fixes the size 'batch' to 3"
        with pytest.raises(MatchError, match=f"^{words}"):
            toy.call(asks_for_numbers[0], toy.outputs["logits"])


def test_a_pass_that_fixes_a_size_is_refused(toy):
    assert int(toy.symbol("C")) != int(toy.symbol("N"))
    words = "^the pass that adds node neg.* fixes the size 'C' to 227"
    with toy.before(toy.output_node), pytest.raises(MatchError, match=words):
        toy.call(aten.neg.default, toy.outputs["logits"])


def test_an_edited_graph_is_a_valid_program(toy):
    batch = toy.shape(toy.inputs["input_ids"])[0]
    shift = toy.constant("shift", torch.tensor([2.0]))
    factor = toy.input("factor", (batch, 1, 1), torch.float32)
    unused = toy.constant("unused", torch.zeros(3))
    with toy.before(toy.output_node):
        scaled = toy.call(aten.mul.Tensor, toy.outputs["logits"], factor)
        toy.outputs["scaled"] = toy.call(aten.add.Tensor, scaled, shift)
    program = toy.program()
    assert toy.closed and unused not in toy.specs
    assert [spec.kind.name for spec in program.graph_signature.output_specs] == ["USER_OUTPUT"] * 2
    assert list(program.graph_signature.user_inputs) == ["input_ids", "position_ids", "factor"]
    logits, out = program.module()(*GIVEN.values(), torch.full((2, 1, 1), 3.0))
    torch.testing.assert_close(out, logits * 3 + 2)


def test_depends_on_follows_values_and_not_shapes(toy):
    positional = toy.depends_on([toy.inputs["position_ids"]])
    data = toy.depends_on([toy.inputs["input_ids"]])
    (attention,) = toy.calls(torch.ops.keysieve.attention.default)
    query, key = attention.args[:2]
    assert query in positional and key not in positional and {query, key} <= data
    with toy.before(toy.output_node):
        size = toy.size(toy.inputs["input_ids"], 1)
        steps = toy.call(aten.arange.default, size)
    assert steps not in toy.depends_on([toy.inputs["input_ids"]])


def test_ancestors_stop_where_told(toy):
    (attention,) = toy.calls(torch.ops.keysieve.attention.default)
    query = attention.args[0]
    everything = toy.ancestors([query])
    assert everything[-1] is query and toy.inputs["input_ids"] in everything
    assert toy.ancestors([query], stop=[query]) == []
    product = query.args[0]
    assert toy.inputs["input_ids"] not in toy.ancestors([query], stop=[product])
    order = list(toy.fx.nodes)
    assert [order.index(node) for node in everything] == sorted(order.index(node) for node in everything)


def test_evaluate_is_float64_even_for_a_float16_model():
    model = tiny_model("llama")
    for parameter in model.parameters():  # as transformers loads it: buffers stay float32
        parameter.data = parameter.data.half()
    half, single = capture(model), matched("llama").graph
    positions = torch.arange(900, 907).repeat(2, 1)
    found = []
    for graph in (half, single):
        cos = graph.calls(aten.cos.default)[0]
        given = {graph.inputs["position_ids"]: positions, graph.inputs["input_ids"]: GIVEN["input_ids"]}
        found.append(graph.evaluate(cos, given))
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    # The weights are rounded to float16, the arithmetic is not.
    logits = half.evaluate(half.outputs["logits"], {half.inputs[name]: value for name, value in GIVEN.items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert half.outputs["logits"].meta["val"].dtype == torch.float16 and logits.dtype == torch.float64
    torch.testing.assert_close(logits, model(**GIVEN, use_cache=False).logits.double(), rtol=0, atol=1e-4)


def test_evaluate_all_keeps_what_is_asked_for(toy):
    """Outputs that feed each other, and one that was given; in the dtype asked for."""
    (attention,) = toy.calls(torch.ops.keysieve.attention.default)
    query, logits = attention.args[0], toy.outputs["logits"]
    given = {toy.inputs[name]: value for name, value in GIVEN.items()}
    tokens, *found = toy.evaluate_all([toy.inputs["input_ids"], query, logits], given, torch.float32)
    assert tokens is GIVEN["input_ids"] and [value.dtype for value in found] == [torch.float32] * 2
    torch.testing.assert_close(found[0].double(), toy.evaluate(query, given), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], run(toy, GIVEN)["logits"], rtol=1e-6, atol=1e-6)


def test_constants_may_share_a_name(toy):
    both = [toy.constant("shift", torch.tensor([value])) for value in (2.0, 3.0)]
    with toy.before(toy.output_node):
        for index, node in enumerate(both):
            toy.outputs[f"shifted_{index}"] = toy.call(aten.add.Tensor, toy.outputs["logits"], node)
    out = toy.program().module()(*GIVEN.values())
    assert len({toy.specs[node].target for node in both}) == 2
    torch.testing.assert_close(out[1] - out[0], torch.full_like(out[0], 2.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(out[2] - out[0], torch.full_like(out[0], 3.0), rtol=0, atol=1e-5)


def test_clone_is_the_subgraph_with_other_inputs_and_sizes():
    """The model's own RoPE on 4 vectors a head at a position of their own, beside the tokens'."""
    found = match("llama")
    graph, rope = found.graph, found.ropes[1]
    batch, tokens = graph.shape(graph.inputs["input_ids"])
    vectors = graph.input("vectors", (batch, 4, 4, 16), torch.float32)
    now = graph.input("now", (batch, 4), torch.int64)
    with graph.before(graph.output_node):
        turned = graph.clone(
            rope.attention.query, {rope.query_pre: vectors, graph.inputs["position_ids"]: now}, {str(tokens): 4}
        )
    assert [str(size) for size in graph.shape(turned)] == [str(batch), "4", "4", "16"]
    graph.outputs["turned"] = turned
    x, places = torch.randn(2, 4, 4, 16), torch.randint(0, 4000, (2, 4))
    out = run(graph, GIVEN | {"vectors": x, "now": places})
    cos, sin = tiny_model("llama").model.rotary_emb(x, places)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.testing.assert_close(out["turned"], apply_rotary_pos_emb(x, x, cos, sin)[0], rtol=1e-6, atol=1e-6)
    expected = tiny_model("llama")(**GIVEN, use_cache=False).logits
    torch.testing.assert_close(out["logits"], expected, rtol=1e-5, atol=1e-5)
