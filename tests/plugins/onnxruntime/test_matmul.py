"""KeySieveMatMul of the custom-op library, on every instruction set that this processor has, against plain torch."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from keysieve.plugins.contract import AROUND, DOMAIN, MATMUL
from support.library import library_session

EPSILON = 1e-3


@lru_cache
def session(threads=1, rank=3, around=()):
    """around: which of norm and residual are there."""
    ranks = {"x": rank, "weight": 2, "norm": 1, "residual": 3}
    ports = [port for port in MATMUL.inputs if port not in AROUND or port.name in around]
    inputs = [helper.make_tensor_value_info(p.name, TensorProto.FLOAT, [None] * ranks[p.name]) for p in ports]
    names = [port.name if port in ports else "" for port in MATMUL.inputs]
    node = helper.make_node(MATMUL.name, names, ["y"], domain=DOMAIN, epsilon=EPSILON)
    return library_session([node], inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], threads)


def given(tokens, rows, depth, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((1, tokens, depth)), rng.standard_normal((rows, depth))
    return {"x": x.astype(np.float32), "weight": weight.astype(np.float32)}


# Rows that are no whole vectors, panels or streams, and depths of broken vectors and of more than a panel holds.
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (3, 20), (9, 64), (70, 129), (200, 300), (129, 576)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8, 24, 33])
def test_products_equal_plain_torch(tokens, rows, depth, instructions):
    inputs = given(tokens, rows, depth)
    found = session().run(None, inputs)[0]
    wanted = torch.from_numpy(inputs["x"]).double() @ torch.from_numpy(inputs["weight"]).double().T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-6 * depth**0.5 * 3)


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (9, 64), (70, 129), (200, 300)])
@pytest.mark.parametrize("tokens", [1, 3, 8, 33])
def test_what_stands_around_a_product(tokens, rows, depth, instructions):
    rng = np.random.default_rng(3)
    inputs = given(tokens, rows, depth)
    inputs["x"][0, 0] *= 1e-3  # what epsilon is for
    around = {
        "norm": rng.uniform(-2, 2, depth).astype(np.float32),
        "residual": rng.standard_normal((1, tokens, rows)).astype(np.float32),
    }
    x, weight = (torch.from_numpy(inputs[name]).double() for name in ("x", "weight"))
    norm = torch.from_numpy(around["norm"]).double()
    for names in (("norm",), ("residual",), ("norm", "residual")):
        some = torch.nn.functional.rms_norm(x, (depth,), norm, EPSILON) if "norm" in names else x
        wanted = some @ weight.T + (torch.from_numpy(around["residual"]) if "residual" in names else 0)
        found = session(around=names).run(None, inputs | {name: around[name] for name in names})[0]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-6 * depth**0.5 * 6)


@pytest.mark.parametrize("tokens", [1, 20])
def test_heads_may_make_up_the_depth(tokens, instructions):
    inputs = given(tokens, 40, 96)
    heads = inputs | {"x": inputs["x"].reshape(1, tokens, 3, 32)}
    assert np.array_equal(session(rank=4).run(None, heads)[0], session().run(None, inputs)[0])


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_threads_and_ranks_change_nothing(tokens, instructions):
    inputs = given(tokens, 700, 96)
    one, two = (session(threads).run(None, inputs)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    assert np.array_equal(session(rank=2).run(None, {**inputs, "x": inputs["x"][0]})[0], one[0])


def test_no_tokens() -> None:
    assert session().run(None, given(0, 40, 96))[0].shape == (1, 0, 40)


@pytest.mark.parametrize("tokens", [1, 9, 30])
def test_what_is_not_finite_is_not_hidden(tokens, instructions):
    inputs = given(tokens, 40, 96)
    inputs["x"][0, 0, 95] = np.nan
    inputs["weight"][7, 0] = np.inf
    found = session().run(None, inputs)[0]
    assert np.isnan(found[0, 0]).all() and np.isfinite(np.delete(found[0, 1:], 7, -1)).all()
    assert not np.isfinite(found[..., 7]).any()


def test_what_does_not_fit_is_refused() -> None:
    inputs = given(2, 40, 96)
    with pytest.raises(Exception, match=r"KeySieveMatMul: x is \[1,2,64\], not \[\.\.\., 96\]"):
        session().run(None, {**inputs, "x": inputs["x"][..., :64]})
    for name, size in (("norm", (64,)), ("residual", (1, 2, 64))):
        with pytest.raises(Exception, match=f"KeySieveMatMul: {name} is .*64\\], not .*\\[.*\\]"):
            session(around=(name,)).run(None, {**inputs, name: np.zeros(size, np.float32)})
