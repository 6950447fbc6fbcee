"""The graph with a cache, run eagerly in torch, is the model: any split of a sequence into steps gives its logits."""

import pytest
import torch

from keysieve.passes.find_attention import find_attention
from keysieve.passes.insert_cache import insert_cache
from support.graphs import SideBySide, ToyDecoder, graph_of, groups_of, match, run
from support.tiny_models import tiny_model

BATCH, CAPACITY = 3, 20
STATE = ["count", "position", "length", "plan", "keep"]


@pytest.fixture(scope="module")
def llama():
    found = match("llama")
    cache = insert_cache(found.graph, found.attentions, found.groups, "per_head")
    return found.graph, cache


def with_cache(graph, scope):
    attentions = find_attention(graph).matches
    return insert_cache(graph, attentions, groups_of(attentions), scope)


def empty_state(graph, plan_layers=1, kv_heads=2, head_dim=16, layers=3):
    caches = {
        f"{name}_{n}": torch.zeros(BATCH, kv_heads, CAPACITY, head_dim)
        for n in range(layers)
        for name in ("key", "value")
    }
    return caches | {
        "length": torch.zeros(BATCH, dtype=torch.int32),
        "position": torch.zeros(BATCH, dtype=torch.int64),
        "keep": torch.full((BATCH,), -1, dtype=torch.int32),
        "plan": torch.zeros(plan_layers, BATCH, kv_heads, CAPACITY, dtype=torch.int32),
    }


def feed(graph, state, tokens, count):
    out = run(graph, state | {"input_ids": tokens, "count": torch.tensor(count, dtype=torch.int32)})
    state |= {name.removesuffix("_next"): value for name, value in out.items() if name.endswith("_next")}
    state["position"] = state["position"] + torch.tensor(count)
    return out["logits"]


def test_inputs_and_outputs(llama):
    graph, cache = llama
    batch, tokens = graph.shape(graph.inputs["input_ids"])
    capacity = graph.symbol("capacity")
    caches = [f"{name}_{layer}" for layer in range(3) for name in ("key", "value")]
    assert list(graph.inputs) == ["input_ids", *STATE, *caches], "position_ids is gone"
    assert set(graph.outputs) == {"logits", "length_next", *(f"{name}_next" for name in caches)}
    shapes = {name: graph.shape(node) for name, node in graph.inputs.items()}
    assert all(shapes[name] == (batch,) for name in ("count", "position", "length", "keep"))
    assert shapes["plan"] == (1, batch, 2, capacity)
    assert all(shapes[name] == (batch, 2, capacity, 16) for name in caches)
    dtypes = {name: node.meta["val"].dtype for name, node in graph.inputs.items()}
    assert dtypes["position"] == torch.int64 and dtypes["key_0"] == torch.float32
    assert all(dtypes[name] == torch.int32 for name in ("count", "length", "plan", "keep"))
    for name in caches:
        assert graph.shape(graph.outputs[f"{name}_next"]) == shapes[name]
    assert graph.shape(cache.positions) == (batch, tokens) and [len(keys) for keys in cache.keys] == [3]


def test_only_update_reads_the_old_cache(llama):
    graph, _ = llama
    update = torch.ops.keysieve.update.default
    for layer in range(3):
        for name in ("key", "value"):
            users = graph.inputs[f"{name}_{layer}"].users
            (user,) = [node for node in users if node.target is not torch.ops.aten.sym_size.int]
            assert user.target is update and user.args[7] == layer
    assert not graph.calls(torch.ops.keysieve.attention.default)
    assert len(graph.calls(torch.ops.keysieve.attend.default)) == len(graph.calls(update)) == 3


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "smollm3"])
def test_any_split_into_steps_gives_the_models_logits(name, llama):
    if name == "llama":
        graph = llama[0]
    else:
        found = match(name)
        graph = found.graph
        insert_cache(graph, found.attentions, found.groups, "per_head")
    config = tiny_model(name).config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tokens = torch.randint(3, 300, (BATCH, 18))
    lengths = [18, 11, 1]
    expected = [
        tiny_model(name)(input_ids=row[None, :n], use_cache=False).logits[0]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    state = empty_state(graph, kv_heads=kv_heads, layers=config.num_hidden_layers)
    done = [0, 0, 0]
    for size in (7, 1, 8, 2):
        count = [min(size, n - d) for n, d in zip(lengths, done, strict=True)]
        chunk = torch.zeros(BATCH, size, dtype=torch.long)  # padded on the right
        for b, (d, n) in enumerate(zip(done, count, strict=True)):
            chunk[b, :n] = tokens[b, d : d + n]
        logits = feed(graph, state, chunk, count)
        for b, (d, n) in enumerate(zip(done, count, strict=True)):
            torch.testing.assert_close(logits[b, :n], expected[b][d : d + n], rtol=1e-4, atol=2e-5)
        done = [d + n for d, n in zip(done, count, strict=True)]
        assert state["length"].tolist() == done


def test_a_plan_is_executed_by_the_next_step_and_positions_go_on(llama):
    """Sequence 0 drops rows 2 and 4; what it sees from then on is the model with those two masked."""
    graph, _ = llama
    tokens = torch.randint(3, 300, (BATCH, 9))
    state = empty_state(graph)
    feed(graph, state, tokens[:, :6], [6] * BATCH)
    before = {name: value.clone() for name, value in state.items() if name.startswith(("key", "value"))}
    state["keep"] = torch.tensor([4, -1, -1], dtype=torch.int32)
    state["plan"][0, 0, :, :4] = torch.tensor([0, 1, 3, 5])
    logits = feed(graph, state, tokens[:, 6:7], [1] * BATCH)
    assert state["length"].tolist() == [5, 7, 7] and state["position"].tolist() == [7, 7, 7]
    for name, old in before.items():
        assert torch.equal(state[name][0, :, :4], old[0, :, [0, 1, 3, 5]])
        assert torch.equal(state[name][1:, :, :6], old[1:, :, :6])
    from support.masked_forward import forward

    def visible(layer, n):
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen[6, [2, 4]] = False
        return seen.expand(2, n, n).numpy()

    expected, _ = forward(tiny_model("llama"), tokens[0, :7].tolist(), visible)
    torch.testing.assert_close(logits[0, 0], expected[6], rtol=1e-4, atol=2e-5)
    dense = tiny_model("llama")(input_ids=tokens[:, :7], use_cache=False).logits
    torch.testing.assert_close(logits[1:, 0], dense[1:, 6], rtol=1e-4, atol=2e-5)
    assert (logits[0, 0] - dense[0, 6]).abs().max() > 1e-3


@pytest.mark.parametrize(("scope", "shape"), [("per_layer_per_head", (1, 2)), ("per_head", (1, 2)), ("union", (1, 1))])
def test_plan_input_has_the_shape_of_the_scope(scope, shape):
    graph = graph_of(ToyDecoder(lambda query, key, positions: (query, key)))
    with_cache(graph, scope)
    plan = graph.shape(graph.inputs["plan"])
    assert (plan[0], plan[2]) == shape


def test_layers_of_one_shape_share_a_plan():
    graph = graph_of(SideBySide(2, 4, 2))
    cache = with_cache(graph, "per_layer_per_head")
    shapes = {name: graph.shape(node) for name, node in graph.inputs.items() if name.startswith("plan")}
    assert {name: (shape[0], shape[2]) for name, shape in shapes.items()} == {"plan_0": (2, 2), "plan_1": (1, 4)}
    updates = graph.calls(torch.ops.keysieve.update.default)
    assert [(node.args[3].name, node.args[7]) for node in updates] == [("plan_0", 0), ("plan_1", 0), ("plan_0", 1)]
    outputs = [[graph.outputs[f"key_{layer}_next"] for layer in group] for group in ((0, 2), (1,))]
    assert cache.keys == outputs
    lengths = {node.args[place] for node in updates for place in (2, 4)}
    assert lengths == {graph.inputs["length"], graph.inputs["keep"]}


TURNS = 0.3 * torch.arange(4)


def rope(query, key, positions):
    angle = positions[:, None, :, None] * TURNS
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return [x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (query, key)]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"window": 6}, 5),
        ({"window": 1}, 0),
        ({"chunk": 6}, 5),
        ({"window": 6, "softcap": 2.0, "sinks": True}, 5),
        ({"softcap": 2.0}, None),
        ({"sinks": True}, None),
    ],
)
def test_a_windows_cache_is_small_and_exact(options, rows):
    """Unequal sequences in steps of many sizes, in a cache with as little room as the steps allow."""
    torch.manual_seed(0)
    toy, largest = ToyDecoder(rope, **options), 4
    graph = graph_of(toy)
    cache = with_cache(graph, "per_layer_per_head")
    capacity = 25 if rows is None else rows + largest
    state = {name: torch.zeros(BATCH, 2, capacity, 8) for name in ("key_0", "value_0")}
    state |= {"position": torch.zeros(BATCH, dtype=torch.int64)}
    if rows is None:
        assert not cache.windows
        state |= {"length": torch.zeros(BATCH, dtype=torch.int32), "keep": torch.full((BATCH,), -1, dtype=torch.int32)}
        state |= {"plan": torch.zeros(1, BATCH, 2, capacity, dtype=torch.int32)}
    else:
        assert [(window.size, window.layers) for window in cache.windows] == [(rows + 1, [0])] and not cache.keys
        state |= {"window_length_0": torch.zeros(BATCH, dtype=torch.int32)}
    tokens, done = torch.randint(3, 300, (BATCH, 25)), torch.zeros(BATCH, dtype=torch.int64)
    positions = torch.arange(25).expand(BATCH, -1)
    with torch.no_grad():
        expected = toy(tokens, positions)
    for size, skipped in ((4, 0), (1, 2), (1, 0), (4, 1), (3, 1), (1, 0), (4, 0), (2, 0), (1, 0), (4, 0)):
        count = torch.tensor([size, size - skipped if size > skipped else 0, size])
        chunk = torch.zeros(BATCH, size, dtype=torch.long)
        for b in range(BATCH):
            chunk[b, : count[b]] = tokens[b, done[b] : done[b] + count[b]]
        logits = feed(graph, state, chunk, count.tolist())
        for b in range(BATCH):
            torch.testing.assert_close(
                logits[b, : count[b]], expected[b, done[b] : done[b] + count[b]], rtol=1e-4, atol=1e-5
            )
        done += count
    assert done.tolist() == [25, 22, 25] and state["position"].tolist() == [25, 22, 25]
