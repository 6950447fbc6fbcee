"""The score kernel, in Triton's interpreter and on a GPU, against the reference in float64."""

import pytest
import torch

from keysieve.kernels.reference import score
from keysieve.kernels.triton.configuration import KernelConfiguration


def configuration(**changes):
    values = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "float32"} | changes
    head_dim = values["head_dim"]
    return KernelConfiguration(**{"value_dim": head_dim, "rotary_dim": head_dim} | values)


def inputs(model, length, limit, capacity):
    """Random inputs; every key that is not held is NaN, so that a kernel which reads it shows."""
    batch = len(length)
    trig = model.policy == "trig"
    heads = (model.layers, batch, model.query_heads)
    length = torch.tensor(length, dtype=torch.int32)
    keys = []
    for _ in range(model.layers):
        key = torch.randn(batch, model.kv_heads, capacity, model.head_dim)
        held = torch.arange(capacity) < length[:, None]
        keys.append(key.masked_fill(~held[:, None, :, None], torch.nan).to(getattr(torch, model.dtype)))
    return {
        "length": length,
        "limit": torch.tensor(limit, dtype=torch.int32),
        "position": torch.randint(0, 1 << 40, (batch,)),
        "centre": torch.randn(*heads, model.offsets, model.head_dim) if trig else torch.zeros(1, 1, 1, 1, 1),
        "weight": torch.randn(*heads, model.rotary_dim // 2) if trig else torch.zeros(1, 1, 1, 1),
        "keys": keys,
    }


def attributes(model):
    return {
        "policy": model.policy,
        "query_heads": model.query_heads,
        "rotary_dim": model.rotary_dim,
        "interleaved": int(model.interleaved),
    }


def found_by(kernels, model, given):
    """Scores, NaN where the kernel writes nothing."""
    heads = (model.layers, len(given["length"]), model.query_heads)
    scores = torch.full((*heads, given["keys"][0].shape[2]), torch.nan)
    found, _ = kernels("score", **given, **attributes(model), scores=scores)
    return found


def expected(model, given):
    return score(**given | {"keys": [key.double() for key in given["keys"]]}, **attributes(model))


def check(kernels, model, given):
    """Held rows of due sequences within 1e-5 of the largest score of the head; all else left alone."""
    found = found_by(kernels, model, given)
    want = expected(model, given)
    due = given["length"] >= given["limit"]
    written = (due[:, None] & (torch.arange(want.shape[-1]) < given["length"][:, None]))[None, :, None]
    written = written.expand_as(want)
    assert torch.isnan(found[~written]).all()
    finite = torch.isfinite(want)
    scale = torch.where(finite & written, want, 0).abs().amax(-1, keepdim=True)
    error = torch.where(finite & written, found.double() - want, 0).abs()
    assert (error <= 1e-5 * scale).all(), f"largest error {(error / scale.clamp(min=1e-30)).max():.1e}"
    odd = ~finite & written
    assert torch.equal(found[odd].nan_to_num(7, 8, 9), want[odd].float().nan_to_num(7, 8, 9))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16", "head_dim": 128, "query_heads": 2, "kv_heads": 2},
        {"dtype": "bfloat16", "head_dim": 128, "query_heads": 16, "kv_heads": 1},
        {"dtype": "bfloat16", "head_dim": 80, "rotary_dim": 32},
        {"dtype": "float16", "head_dim": 80, "rotary_dim": 20, "interleaved": True, "offsets": 3},
        {"dtype": "float16", "head_dim": 96, "query_heads": 9, "kv_heads": 3, "interleaved": True},
        {"dtype": "bfloat16", "head_dim": 256, "rotary_dim": 64, "query_heads": 6, "kv_heads": 1},
        {"dtype": "float32", "head_dim": 256, "offsets": 2},
        {"dtype": "float32", "head_dim": 8, "rotary_dim": 2, "offsets": 17, "query_heads": 1, "kv_heads": 1},
        {"dtype": "float16", "rotary_dim": 0},
        {"dtype": "float16", "head_dim": 64, "query_heads": 14, "kv_heads": 2, "offsets": 2},
    ],
    ids=str,
)
def test_trig(kernels, changes):
    model = configuration(**{"layers": 1} | changes)
    check(kernels, model, inputs(model, length=[90], limit=[90], capacity=101))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_several_blocks_layers_and_sequences(kernels, dtype):
    model = configuration(dtype=dtype)
    check(kernels, model, inputs(model, length=[150, 263], limit=[150, 1], capacity=267))


@pytest.mark.parametrize("policy", ["key_norm", "streaming", "random"])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_other_policies(kernels, policy, head_dim):
    model = configuration(policy=policy, head_dim=head_dim, dtype="bfloat16", query_heads=6)
    check(kernels, model, inputs(model, length=[260, 70], limit=[2, 3], capacity=301))


@pytest.mark.parametrize("policy", ["random", "streaming"])
def test_policies_without_keys_are_exact(kernels, policy):
    model = configuration(policy=policy)
    given = inputs(model, length=[300], limit=[1], capacity=300)
    found = found_by(kernels, model, given)
    assert torch.equal(found, expected(model, given).float())


@pytest.mark.parametrize(
    ("length", "limit"), [([0, 1], [0, 1]), ([9, 8, 10], [10, 8, 11]), ([5, 5, 5], [6, 6, 6]), ([64, 65], [1, 1])]
)
def test_lengths_and_due_flags(kernels, length, limit):
    model = configuration(dtype="float16")
    check(kernels, model, inputs(model, length, limit, capacity=70))


def test_keys_that_are_not_finite_or_negative_zero(kernels):
    model = configuration(offsets=2)
    given = inputs(model, length=[40], limit=[1], capacity=40)
    key = given["keys"][0]
    key[..., 3, :], key[..., 4, :] = -0.0, 0.0
    key[..., 5, 1], key[..., 6, 2], key[..., 7, 3] = torch.nan, torch.inf, -torch.inf
    key[..., 8, 1], key[..., 8, 40] = torch.inf, torch.inf
    check(kernels, model, given)
