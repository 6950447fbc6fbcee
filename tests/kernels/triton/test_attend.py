"""The attention kernel, in Triton's interpreter and on a GPU, against the reference in float64."""

import pytest
import torch

from keysieve.kernels.reference import attend_rows

# Of the largest value: what a 16-bit weight and a 16-bit result are rounded by.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 1e-5}


def inputs(dtype="float32", heads=4, kv_heads=2, tokens=1, head_dim=64, value_dim=None, capacity=90, length=(70, 33)):
    """Queries as a projection leaves them, [B,S,Hq,D]; rows that nobody has written hold NaN and infinity."""
    kind, batch = getattr(torch, dtype), len(length)
    length = torch.tensor(length)
    query = torch.randn(batch, tokens, heads, head_dim).to(kind).transpose(1, 2)
    caches = []
    for width in (head_dim, value_dim or head_dim):
        rows = torch.randn(batch, kv_heads, capacity, width)
        unheld = torch.arange(capacity) >= length[:, None]
        rows = rows.masked_fill(unheld[:, None, :, None], torch.nan)
        rows[..., -1, :2] = torch.where(unheld[:, -1, None, None], torch.inf, rows[..., -1, :2])
        caches.append(rows.to(kind))
    last = length[:, None] - tokens + torch.arange(tokens)
    return {
        "query": query,
        "key": caches[0],
        "value": caches[1],
        "first": None,
        "last": last,
        "sinks": None,
        "scale": head_dim**-0.5,
        "softcap": 0.0,
    }


def check(kernels, given):
    found, after = kernels("attend", **given)
    if "counters" in given:
        assert not after["counters"].any()
        given = {name: value for name, value in given.items() if name != "counters"}
    double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    # The reference multiplies rows that are not seen by zero.
    for name in ("key", "value"):
        double[name] = double[name].nan_to_num(0.0, 0.0, 0.0)
    want = attend_rows(**double)
    dtype = str(given["query"].dtype).removeprefix("torch.")
    assert found.dtype == given["value"].dtype
    assert found.shape == want.shape
    assert found.transpose(1, 2).is_contiguous()
    error = (found.double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * max(want.abs().max(), 1.0), f"largest error {error:.1e}"
    return found, want


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [
        (4, 4, 64, 64),
        (6, 2, 80, 80),
        (8, 2, 128, 128),
        (8, 1, 96, 128),
        (7, 1, 256, 64),
        (2, 1, 8, 256),
        (16, 1, 40, 24),
    ],
)
def test_decoding(kernels, dtype, heads, kv_heads, head_dim, value_dim):
    check(kernels, inputs(dtype, heads, kv_heads, 1, head_dim, value_dim))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(33, 6, 2, 64), (5, 8, 1, 128), (40, 2, 1, 80)])
def test_chunks_of_prompts(kernels, dtype, tokens, heads, kv_heads, head_dim):
    check(kernels, inputs(dtype, heads, kv_heads, tokens, head_dim, capacity=95, length=(tokens, 77)))


@pytest.mark.parametrize(
    ("dtype", "tokens", "kv_heads"), [("bfloat16", 1, 1), ("float16", 2, 2), ("bfloat16", 20, 1), ("float32", 1, 2)]
)
def test_several_programs_share_the_rows(kernels, dtype, tokens, kv_heads):
    """Of sequences of a few rows, of one share and of several; for each the last to arrive adds."""
    given = inputs(dtype, 4, kv_heads, tokens, 64, capacity=700 if tokens < 20 else 1300, length=(690, 130, 21))
    found, _ = check(kernels, given)
    again, _ = check(kernels, given | {"counters": torch.zeros(64, dtype=torch.int32)})
    assert torch.equal(found, again)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, True), (2.0, False), (30.0, True)])
@pytest.mark.parametrize("capacity", [90, 600])
def test_softcap_and_sinks(kernels, tokens, softcap, with_sinks, capacity):
    given = inputs("float16", tokens=tokens, capacity=capacity, length=(capacity - 20, 33)) | {"softcap": softcap}
    if with_sinks:
        given["sinks"] = 3 * torch.randn(4)
    given["query"] = given["query"] * 4
    check(kernels, given)


@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.float16])
def test_sinks_may_have_another_dtype(kernels, sink_dtype):
    check(kernels, inputs("float16") | {"sinks": torch.randn(4).to(sink_dtype)})


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("window", "integers"), [(1, torch.int32), (16, torch.int64), (200, torch.int32)])
def test_windows(kernels, tokens, window, integers):
    given = inputs("float16", tokens=tokens, capacity=700, length=(650, 60))
    given["first"] = (given["last"] - window + 1).to(integers)  # below row 0 for the second
    given["last"] = given["last"].to(integers)
    check(kernels, given)


def test_rows_below_a_window_are_not_read(kernels):
    given = inputs(tokens=3, length=(70, 60))
    given["first"] = given["last"] - 7
    for name in ("key", "value"):
        given[name][:, :, :45] = torch.nan
    found, _ = check(kernels, given)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("capacity", [60, 600])
def test_tokens_that_see_nothing_and_empty_sequences(kernels, with_sinks, capacity):
    given = inputs(tokens=3, capacity=capacity, length=(0, capacity))
    given["last"][0] = torch.tensor([-3, -2, -1])
    given["first"] = torch.zeros_like(given["last"])
    given["first"][1, 1] = given["last"][1, 1] + 1
    given["sinks"] = torch.randn(4) if with_sinks else None
    found, _ = check(kernels, given)
    assert (found[0] == 0).all()
    assert (found[1, :, 1] == 0).all()


def test_padded_tokens_see_no_further_than_the_cache(kernels):
    """A chunk's padding lies behind its valid tokens, and its last tokens may point past the capacity."""
    given = inputs(tokens=8, capacity=40, length=(40, 40))
    given["last"] = given["last"] + 4
    check(kernels, given)


def test_queries_of_any_strides_and_none_at_all(kernels):
    given = inputs(tokens=4, head_dim=40)
    wide = torch.randn(2, 4, 3, 4, 48)
    given["query"] = wide[:, :, 1, :, 4:44].transpose(1, 2)
    check(kernels, given)
    given["query"], given["last"] = given["query"][:, :, :0], given["last"][:, :0]
    found, _ = kernels("attend", **given)
    assert found.shape == (2, 4, 0, 40)
