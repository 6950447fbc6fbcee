"""KeySieveMatMul of the custom-op library, on every instruction set that this processor has, against plain torch."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from keysieve.plugins.contract import DOMAIN, MATMUL
from support.library import library_session


@lru_cache
def session(threads=1, rank=3):
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, [None] * rank), info("weight", TensorProto.FLOAT, [None, None])]
    node = helper.make_node(MATMUL.name, ["x", "weight"], ["y"], domain=DOMAIN)
    return library_session([node], inputs, [info("y", TensorProto.FLOAT, None)], threads)


def given(tokens, rows, depth, seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((1, tokens, depth)), rng.standard_normal((rows, depth))
    return {"x": x.astype(np.float32), "weight": weight.astype(np.float32)}


# Rows that are no whole vectors, panels or streams, and depths of broken vectors and of more than a panel holds.
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (3, 20), (9, 64), (70, 129), (200, 300), (129, 576)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 33])
def test_products_equal_plain_torch(tokens, rows, depth, instructions):
    inputs = given(tokens, rows, depth)
    found = session().run(None, inputs)[0]
    wanted = torch.from_numpy(inputs["x"]).double() @ torch.from_numpy(inputs["weight"]).double().T
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-6 * depth**0.5 * 3)


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_threads_and_ranks_change_nothing(tokens, instructions):
    inputs = given(tokens, 700, 96)
    one, two = (session(threads).run(None, inputs)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    assert np.array_equal(session(rank=2).run(None, {**inputs, "x": inputs["x"][0]})[0], one[0])


def test_no_tokens() -> None:
    assert session().run(None, given(0, 40, 96))[0].shape == (1, 0, 40)


@pytest.mark.parametrize("tokens", [1, 9])
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
