"""KeySieveLinear of the custom-op library, on every instruction set that this processor has, against plain torch."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from keysieve.kernels import reference
from keysieve.plugins.contract import AROUND, DOMAIN, LINEAR
from support.library import library_session

BLOCK = 32
EPSILON = 1e-3
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


def runner(nodes, inputs, threads=1):
    """inputs: (name, type, rank)."""
    infos = [helper.make_tensor_value_info(name, kind, [None] * rank) for name, kind, rank in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return library_session(nodes, infos, [output], threads)


@lru_cache
def session(rows, depth, bits, gated=0, around=(), threads=1, rank=3, weight_rank=3):
    """around: which of norm and residual are there."""
    ports = [port for port in LINEAR.inputs if port not in AROUND or port.name in around]
    names = [port.name if port in ports else "" for port in LINEAR.inputs]
    attributes = {"N": rows, "K": depth, "bits": bits, "gated": gated, "epsilon": EPSILON}
    node = helper.make_node(LINEAR.name, names, ["y"], domain=DOMAIN, **attributes)
    ranks = {"x": rank, "weight": weight_rank, "norm": 1, "residual": 3}
    return runner([node], [(p.name, TYPES[p.dtype], ranks.get(p.name, 2)) for p in ports], threads)


def weights(rows, depth, bits, seed=0):
    rng = np.random.default_rng(seed)
    blocks = -(-depth // BLOCK)
    return {
        "weight": rng.integers(0, 256, (rows, blocks, 4 * bits), np.uint8),
        "scale": rng.uniform(0.5, 2, (rows, blocks)).astype(np.float32),
        "zero": rng.integers(0, 256, (rows, (blocks * bits + 7) // 8), np.uint8),
    }


def on_a_grid(shape, seed=0):
    """Activations that are integers times a power of two in every block, so that rounding changes none."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, shape).astype(np.float32)
    x[..., ::BLOCK] = 127 * np.sign(x[..., ::BLOCK] + 0.5)
    power = rng.integers(-6, 6, (*shape[:-1], -(-shape[-1] // BLOCK)))
    return x * np.repeat(2.0**power, BLOCK, -1)[..., : shape[-1]].astype(np.float32)


def expected(given, bits, gated=False):
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    return reference.linear(**tensors, bits=bits, gated=gated, epsilon=EPSILON)


def close(found, wanted, tolerance=2e-6):
    wanted = wanted.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# Rows that are no whole vectors or panels, depths of broken blocks and of more than a panel holds, one byte of zeros.
@pytest.mark.parametrize(("rows", "depth"), [(1, 32), (5, 50), (70, 96), (33, 576), (200, 800), (129, 1536)])
@pytest.mark.parametrize("tokens", [1, 2, 9, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_equal_plain_torch(bits, tokens, rows, depth, instructions):
    given = {"x": on_a_grid((1, tokens, depth)), **weights(rows, depth, bits)}
    close(session(rows, depth, bits).run(None, given)[0], expected(given, bits))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_within_half_a_step(bits, tokens, instructions):
    rng = np.random.default_rng(1)
    depth, rows = 333, 40
    given = {"x": rng.standard_normal((2, tokens, depth)).astype(np.float32), **weights(rows, depth, bits)}
    given["x"][:, :, 32:64] = 0  # a block without a largest one
    found = session(rows, depth, bits).run(None, given)[0]
    torch_weights = {name: torch.from_numpy(given[name]) for name in ("weight", "scale", "zero")}
    blocks = given["scale"].shape[1]
    unpacked = reference.unpacked
    integers = unpacked(torch_weights["weight"], bits) - unpacked(torch_weights["zero"], bits)[:, :blocks, None]
    matrix = (integers * torch_weights["scale"][..., None]).double().numpy()  # [N,blocks,32]
    x = np.zeros((2, tokens, blocks * BLOCK))
    x[..., :depth] = given["x"]
    x = x.reshape(2, tokens, blocks, BLOCK)
    exact = np.einsum("btki,nki->btn", x, matrix)
    bound = np.einsum("btk,nk->btn", np.abs(x).max(-1) / 254, np.abs(matrix).sum(-1))
    assert (np.abs(found - exact) <= 1.001 * bound).all()
    assert np.abs(found - exact).mean() < 0.1 * bound.mean()  # errors of both signs
    close(found, expected(given, bits), 1e-3)  # a tie may go to the other side


@pytest.mark.parametrize("bits", [4, 8])
def test_the_numbers_are_those_of_matmulnbits(bits):
    given = {"x": on_a_grid((2, 3, 96)), **weights(40, 96, bits)}
    given["zero"] = given["zero"][:, : -(-3 * bits // 8)]
    node = helper.make_node(
        "MatMulNBits",
        list(given),
        ["y"],
        domain="com.microsoft",
        K=96,
        N=40,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=4,
    )
    theirs = runner([node], [("x", 1, 3), ("weight", 2, 3), ("scale", 1, 2), ("zero", 2, 2)]).run(None, given)[0]
    close(session(40, 96, bits).run(None, given)[0], torch.from_numpy(theirs), 1e-5)


@pytest.mark.parametrize("depth", [48, 128])
@pytest.mark.parametrize("tokens", [1, 12])
def test_gated(tokens, depth, instructions):
    x = np.random.default_rng(2).standard_normal((1, tokens, 2 * depth)).astype(np.float32) * 3
    x[0, 0, :4] = [0, 200, -200, -90]  # where e^x is no float any more
    given = {"x": x, **weights(50, depth, 4)}
    found = session(50, depth, 4, gated=1).run(None, given)[0]
    assert np.isfinite(found).all()
    close(found, expected(given, 4, gated=True), 1e-3)


@pytest.mark.parametrize(("rows", "depth"), [(1, 32), (70, 50), (129, 576), (40, 800)])
@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_stands_around_a_product(bits, tokens, rows, depth, instructions):
    rng = np.random.default_rng(3)
    given = {"x": rng.standard_normal((2, tokens, depth)).astype(np.float32), **weights(rows, depth, bits)}
    around = {
        "norm": rng.uniform(-2, 2, depth).astype(np.float32),
        "residual": rng.standard_normal((2, tokens, rows)).astype(np.float32) * 1000,
    }
    given["x"][0, 0] = 0  # what epsilon is for
    for names in (("norm",), ("residual",), ("norm", "residual")):
        inputs = given | {name: around[name] for name in names}
        close(session(rows, depth, bits, around=names).run(None, inputs)[0], expected(inputs, bits), 1e-3)
    grid = given | {"x": on_a_grid((2, tokens, depth)), "residual": around["residual"]}
    close(session(rows, depth, bits, around=("residual",)).run(None, grid)[0], expected(grid, bits))


@pytest.mark.parametrize("tokens", [1, 5])
def test_heads_may_make_up_the_depth(tokens, instructions):
    given = {"x": on_a_grid((2, tokens, 96)), **weights(40, 96, 4)}
    heads = given | {"x": given["x"].reshape(2, tokens, 3, 32)}
    found = session(40, 96, 4, rank=4).run(None, heads)[0]
    assert np.array_equal(found, session(40, 96, 4).run(None, given)[0])


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_block_of_next_to_nothing_counts_as_nothing(tokens, instructions):
    given = {"x": on_a_grid((1, tokens, 96)), **weights(40, 96, 4)}
    nothing = given | {"x": given["x"].copy()}
    given["x"][:, :, 32:64], nothing["x"][:, :, 32:64] = 1e-39, 0
    found, wanted = (session(40, 96, 4).run(None, inputs)[0] for inputs in (given, nothing))
    np.testing.assert_array_equal(found, wanted)


def test_threads_ranks_and_shapes_of_weights_change_nothing(instructions):
    given = {"x": on_a_grid((2, 2, 96)), **weights(300, 96, 4)}
    one, two = (session(300, 96, 4, threads=threads).run(None, given)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    alone = {**given, "x": given["x"][:1, :1]}
    one, two = (session(300, 96, 4, threads=threads).run(None, alone)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
    flat = {**given, "x": given["x"].reshape(4, 96), "weight": given["weight"].reshape(300, 48)}
    found = session(300, 96, 4, rank=2, weight_rank=2).run(None, flat)[0]
    assert np.array_equal(found.reshape(2, 2, 300), session(300, 96, 4).run(None, given)[0])


def test_no_tokens() -> None:
    given = {"x": np.zeros((2, 0, 96), np.float32), **weights(40, 96, 4)}
    assert session(40, 96, 4).run(None, given)[0].shape == (2, 0, 40)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_not_finite_is_not_hidden(tokens, wrong, instructions):
    given = {"x": on_a_grid((1, tokens, 96)), **weights(40, 96, 4)}
    given["x"][0, 0, 70] = wrong
    found = session(40, 96, 4).run(None, given)[0]
    assert not np.isfinite(found[0, 0]).any() and np.isfinite(found[0, 1:]).all()


def test_what_does_not_fit_is_refused() -> None:
    good = {"x": on_a_grid((1, 2, 96)), **weights(40, 96, 4)}
    session(40, 96, 4).run(None, good)
    for change, message in (
        ({"x": good["x"][..., :64]}, "x is \\[1,2,64\\], not \\[\\.\\.\\., 96\\]"),
        ({"weight": good["weight"][:39]}, "weight is \\[39,3,16\\], not \\[40,3,16\\]"),
        ({"weight": good["weight"][..., :8]}, "weight is \\[40,3,8\\], not \\[40,3,16\\]"),
        ({"scale": good["scale"][:, :2]}, "scale is \\[40,2\\], not \\[40,3\\]"),
        ({"zero": good["zero"][:, :1]}, "zero is \\[40,1\\], not \\[40,2\\]"),
    ):
        with pytest.raises(Exception, match=f"KeySieveLinear: .*{message}"):
            session(40, 96, 4).run(None, {**good, **change})
    with pytest.raises(Exception, match=r"KeySieveLinear: x is \[1,2,96\], not \[\.\.\., 192\]"):
        session(40, 96, 4, gated=1).run(None, good)
    around = good | {"norm": np.ones(96, np.float32), "residual": np.zeros((1, 2, 40), np.float32)}
    ready = session(40, 96, 4, around=("norm", "residual"))
    ready.run(None, around)
    with pytest.raises(Exception, match=r"KeySieveLinear: norm is \[95\], not \[96\]"):
        ready.run(None, around | {"norm": np.ones(95, np.float32)})
    with pytest.raises(Exception, match=r"KeySieveLinear: residual is \[1,1,40\], not \[1,2,40\]"):
        ready.run(None, around | {"residual": np.zeros((1, 1, 40), np.float32)})
    both = good | {"x": np.ones((1, 2, 192), np.float32), "norm": around["norm"]}
    with pytest.raises(Exception, match="KeySieveLinear: x cannot be gated and normalised"):
        session(40, 96, 4, gated=1, around=("norm",)).run(None, both)
    for rows, depth, bits in ((0, 96, 4), (40, 0, 4), (40, 96, 2)):
        with pytest.raises(Exception, match="KeySieveLinear: N and K must be above 0, and bits 4 or 8"):
            session(rows, depth, bits)
