"""What launch.py adds to the kernels: layouts, copies, errors, counters, and launches that a CUDA graph can capture."""

import pytest
import torch

from keysieve.errors import ConfigError
from keysieve.kernels import SCOPES, reference
from keysieve.kernels.triton import launch


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def update_inputs(batch=2, heads=2, tokens=3, head_dim=16, value_dim=24, capacity=40):
    plan = torch.stack([torch.randperm(30)[:20].sort().values for _ in range(batch * heads)])
    return {
        "key_new": torch.randn(batch, heads, tokens, head_dim),
        "value_new": torch.randn(batch, heads, tokens, value_dim),
        "length": ints(*[30] * batch),
        "plan": torch.nn.functional.pad(plan, (0, capacity - 20)).view(1, batch, heads, capacity).int(),
        "keep": ints(20, *[-1] * (batch - 1)),
        "key": torch.randn(batch, heads, capacity, head_dim),
        "value": torch.randn(batch, heads, capacity, value_dim),
        "layer": 0,
    }


@pytest.mark.parametrize("layout", ["projections", "parts of one projection", "strides no wide read can have"])
def test_new_rows_of_any_strides(kernels, layout):
    given = update_inputs()
    if layout == "projections":
        for name in ("key_new", "value_new"):
            given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "parts of one projection":
        joined = torch.randn(2, 3, 2, 48)
        given["key_new"], given["value_new"] = joined[..., :16].transpose(1, 2), joined[..., 24:].transpose(1, 2)
    else:
        given["key_new"] = torch.randn(2, 2, 3, 17)[..., :16]
        given["value_new"] = torch.randn(2, 2, 24, 3).transpose(2, 3)
    (key, value), after = kernels("update", **given)
    want_key, want_value = reference.update(**given)
    assert torch.equal(key, want_key)
    assert torch.equal(value, want_value)
    assert torch.equal(after["key"], given["key"])  # a copy was changed


def test_new_rows_of_another_dtype(kernels):
    given = update_inputs()
    for name in ("key", "value"):
        given[name] = given[name].half()
    (key, value), _ = kernels("update", **given)
    for got, want in zip((key, value), reference.update(**given), strict=True):
        assert torch.equal(got, want)


def test_a_plan_that_repeats_one_head(kernels):
    """As that of a sliding window is."""
    given = update_inputs()
    given["plan"] = given["plan"][:, :, :1].expand(-1, -1, 2, -1)
    (key, _), _ = kernels("update", **given)
    assert torch.equal(key, reference.update(**given)[0])


@pytest.mark.parametrize("scope", SCOPES)
def test_selections_are_made_as_the_reference_makes_them(kernels, scope):
    given = (torch.randn(2, 2, 4, 50), ints(45, 40), ints(40, 40), ints(30, 20), ints(0, 0))
    names = ("scores", "length", "limit", "budget", "pinned")
    found, _ = kernels("select", **dict(zip(names, given, strict=True)), scope=scope, kv_heads=2, sinks=2, recent=4)
    for got, want in zip(found, reference.select(*given, scope, 2, 2, 4), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: launch.update_(**update_inputs(head_dim=20)), "head_dim is 20; the GPU kernels take multiples of 8"),
        (
            lambda: launch.attend(
                torch.zeros(1, 1, 1, 8), *torch.zeros(2, 1, 1, 4, 8).double(), None, ints([3]), None, 1.0, 0.0
            ),
            "dtype is 'float64'",
        ),
        (
            lambda: launch.score(
                *(ints(1), ints(1), ints(1).long(), torch.zeros(1, 1, 17, 1, 8), torch.zeros(1, 1, 17, 4)),
                *([torch.zeros(1, 1, 4, 8)], "trig", 17, 8, 0),
            ),
            "1 to 16 query heads",
        ),
        (
            lambda: launch.select(torch.zeros(1, 1, 1, 4), *[ints(1)] * 4, "global", 1, 0, 0),
            "scope is 'global'; choose one of",
        ),
    ],
)
def test_sizes_that_no_kernel_takes_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("count", [64, 1, 0])
def test_counters_are_zeros_again(kernels, count):
    """Where several programs share the rows; too few counters are left alone."""
    query, (key, value) = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 2, 600, 16)
    given = {"query": query, "key": key, "value": value, "first": None, "last": ints(599, 300)[:, None]}
    given |= {"sinks": None, "scale": 0.25, "softcap": 0.0, "counters": torch.zeros(count, dtype=torch.int32)}
    found, after = kernels("attend", **given)
    wanted = reference.attend_rows(query, key, value, None, given["last"], 0.25)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not after["counters"].any()


def test_centres_of_any_strides(kernels):
    """As a graph makes them: permuted, and repeated for every sequence."""
    heads, dim = 4, 16
    given = {
        "length": ints(40, 30),
        "limit": ints(30, 30),
        "position": ints(40, 30).long(),
        "centre": torch.randn(2, 2, heads, 1, dim).permute(1, 0, 2, 3, 4),
        "weight": torch.rand(2, 1, heads, dim // 2).expand(-1, 2, -1, -1),
        "keys": list(torch.randn(2, 2, 2, 40, dim)),
        **{"policy": "trig", "query_heads": heads, "rotary_dim": dim, "interleaved": 0},
    }
    found, _ = kernels("score", **given)
    wanted = reference.score(**given)
    for sequence, rows in enumerate((40, 30)):
        torch.testing.assert_close(found[:, sequence, :, :rows], wanted[:, sequence, :, :rows], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """Score, select, update and attention of a step, captured once and replayed while the sequences grow."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    batch, heads, capacity, dim = 3, 2, 700, 64
    keys, values = (torch.randn(batch, heads, capacity, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    new = torch.randn(batch, 1, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
    query = torch.randn(batch, 1, 8, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
    length, limit, budget = (ints(*row).cuda() for row in ((640, 10, 255), (650, 650, 650), (300, 300, 300)))
    none, keep, evicted = (torch.zeros_like(length) for _ in range(3))
    keep -= 1
    plan = torch.zeros(1, batch, heads, capacity, dtype=torch.int32, device="cuda")
    position = length.long()
    centre, weight = torch.randn(1, batch, 8, 1, dim).cuda(), torch.rand(1, batch, 8, dim // 2).cuda()
    addresses = torch.tensor([keys.data_ptr()], device="cuda")
    read = torch.empty(batch, 8, 1, dim, device="cuda", dtype=torch.float16)

    def step():
        launch.update_(new, new, length, plan, keep, keys, values, 0)
        length.copy_(torch.where(keep >= 0, keep, length) + 1)
        read.copy_(launch.attend(query, keys, values, None, length[:, None] - 1, None, 0.125, 0.0))
        table = (centre, weight, [keys], addresses, "trig", 8, dim, 0)
        scores = launch.score_at(length, limit, position, *table)
        launch.select_(scores, length, limit, budget, none, plan, keep, evicted, "per_layer_per_head", heads, 2, 8)

    state = (keys, values, length, plan, keep, evicted)
    start = [tensor.clone() for tensor in state]
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for run in (step, graph.replay):
        for tensor, value in zip(state, start, strict=True):
            tensor.copy_(value)
        for _ in range(25):
            run()
        torch.cuda.synchronize()
        results.append([tensor.clone() for tensor in (*state, read)])
    assert results[0][2].tolist() == [315, 35, 280]  # one round: 650 rows became 300
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
