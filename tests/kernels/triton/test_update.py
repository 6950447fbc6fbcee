"""The update kernel, in Triton's interpreter and on a GPU: in place, every byte as the reference's."""

from types import SimpleNamespace

import pytest
import torch

from keysieve.kernels.reference import update
from keysieve.kernels.triton.configuration import KernelConfiguration

BITS = {"float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32}


def configuration(**changes):
    values = {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64, "dtype": "float16"}
    return KernelConfiguration(rotary_dim=0, **values | changes)


def some_bits(dtype, *shape):
    """Any bits at all, NaN included: the cache is moved, not calculated with."""
    bits = BITS[dtype]
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max, shape, dtype=bits).view(getattr(torch, dtype))


def random_plan(model, length, keep, capacity):
    """An ascending choice of keep[b] of the length[b] rows; rows behind it are far out of bounds."""
    plan = torch.full((model.plan_layers, len(length), model.plan_heads, capacity), 1 << 30, dtype=torch.int32)
    for layer in range(model.plan_layers):
        for sequence, (rows, kept) in enumerate(zip(length, keep, strict=True)):
            for head in range(model.plan_heads):
                plan[layer, sequence, head, : max(kept, 0)] = torch.randperm(rows)[: max(kept, 0)].sort().values
    return plan


def check(kernels, model, length, keep, tokens, capacity, layer=1, plan=None):
    batch = len(length)
    heads = (batch, model.kv_heads)
    given = {
        "key_new": some_bits(model.dtype, *heads, tokens, model.head_dim),
        "value_new": some_bits(model.dtype, *heads, tokens, model.value_dim),
        "length": torch.tensor(length, dtype=torch.int32),
        "plan": random_plan(model, length, keep, capacity) if plan is None else plan,
        "keep": torch.tensor(keep, dtype=torch.int32),
        "key": some_bits(model.dtype, *heads, capacity, model.head_dim),
        "value": some_bits(model.dtype, *heads, capacity, model.value_dim),
        "layer": layer,
    }
    _, after = kernels("update_", **given)
    # As integers: torch quiets signalling NaNs when it copies 16-bit floats.
    bits = BITS[model.dtype]
    legal = given | {name: given[name].view(bits) for name in ("key_new", "value_new", "key", "value")}
    legal["plan"] = torch.where(given["plan"] == 1 << 30, 0, given["plan"])
    for name, want in zip(("key", "value"), update(**legal), strict=True):
        assert torch.equal(after[name].view(bits), want), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_dtypes_and_head_dims(kernels, dtype, head_dim):
    model = configuration(dtype=dtype, head_dim=head_dim, value_dim=head_dim, kv_heads=1)
    check(kernels, model, length=[70, 64], keep=[40, -1], tokens=3, capacity=75)


@pytest.mark.parametrize("scope", ["per_layer_per_head", "per_head", "union"])
@pytest.mark.parametrize("layer", [0, 1])
def test_plans_of_every_scope(kernels, scope, layer):
    model = configuration(scope=scope)
    check(kernels, model, length=[50, 60], keep=[30, 59], tokens=2, capacity=64, layer=layer)


@pytest.mark.parametrize(("length", "keep"), [(600, 550), (600, 256), (600, 257), (513, 512)])
def test_several_tiles(kernels, length, keep):
    check(kernels, configuration(kv_heads=1), [length], [keep], tokens=5, capacity=620)


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_numbers_of_new_rows(kernels, tokens):
    check(kernels, configuration(), [40, 41, 0], [-1, 20, -1], tokens, capacity=341)


def test_values_of_another_head_dim(kernels):
    check(kernels, configuration(head_dim=96, value_dim=40), [40, 41], [-1, 20], tokens=2, capacity=43)


def test_a_plan_that_changes_nothing_and_one_that_drops_the_first_row(kernels):
    model = configuration(scope="union")
    plan = torch.stack([torch.arange(50), torch.arange(50) + 1]).to(torch.int32)[None, :, None]
    check(kernels, model, [50, 50], [45, 49], tokens=1, capacity=50, plan=plan)


def test_a_plan_that_keeps_no_row(kernels):
    check(kernels, configuration(), [10], [0], tokens=2, capacity=20)


@pytest.mark.parametrize("plan_heads", [1, 2])
def test_rows_of_one_number(kernels, plan_heads):
    model = SimpleNamespace(dtype="float32", kv_heads=2, head_dim=1, value_dim=1, plan_layers=1, plan_heads=plan_heads)
    check(kernels, model, length=[1300, 30, 700], keep=[1100, -1, 0], tokens=3, capacity=1400, layer=0)
