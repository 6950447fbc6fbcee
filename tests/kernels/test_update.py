import pytest
import torch

from keysieve.kernels.reference import update
from support.golden import ints

LAYERS, BATCH, HEADS, CAPACITY, NEW = 3, 3, 2, 10, 2
LENGTH, KEEP = ints(7, 8, 6), ints(4, -1, 0)  # compacts; only appends; compacts to nothing
START = [4, 8, 0]


def caches(dtype=torch.float32):
    """key and value [B, Hkv, C, D or Dv] and the new rows, all values different."""

    def fill(rows, dim, offset):
        size = BATCH * HEADS * rows * dim
        return (torch.arange(size).reshape(BATCH, HEADS, rows, dim) + offset).to(dtype)

    return fill(NEW, 4, 10000), fill(NEW, 3, 20000), fill(CAPACITY, 4, 0), fill(CAPACITY, 3, 5000)


def make_plan(plan_layers, plan_heads):
    """Ascending rows per (layer, b, head), then zeros; rows of the sequence that is not due are rubbish."""
    generator = torch.Generator().manual_seed(1)
    plan = torch.zeros(plan_layers, BATCH, plan_heads, CAPACITY, dtype=torch.int32)
    for layer in range(plan_layers):
        for head in range(plan_heads):
            plan[layer, 0, head, :4] = torch.randperm(7, generator=generator)[:4].sort().values
    plan[:, 1] = 99
    return plan


@pytest.mark.parametrize("plan_layers", [1, LAYERS])
@pytest.mark.parametrize("plan_heads", [1, HEADS])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_compacts_and_appends_every_sequence_by_its_own_plan(plan_layers, plan_heads, layer):
    key_new, value_new, key, value = caches()
    plan = make_plan(plan_layers, plan_heads)
    found = update(key_new, value_new, LENGTH, plan, KEEP, key, value, layer=layer)
    for out, new, old in zip(found, (key_new, value_new), (key, value), strict=True):
        assert out.shape == old.shape and torch.isfinite(out).all()
        for b in range(BATCH):
            for head in range(HEADS):
                source = plan[min(layer, plan_layers - 1), b, min(head, plan_heads - 1)].tolist()
                rows = source[: KEEP[b]] if KEEP[b] >= 0 else range(int(LENGTH[b]))
                expected = [*(old[b, head, row] for row in rows), *new[b, head]]
                assert torch.equal(out[b, head, : START[b] + NEW], torch.stack(expected))


def test_inputs_are_not_modified_and_outputs_are_new():
    inputs = caches()
    before = [t.clone() for t in inputs]
    key_new, value_new, key, value = inputs
    out = update(key_new, value_new, LENGTH, make_plan(1, 1), KEEP, key, value, layer=0)
    for tensor in out:
        tensor.fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_fills_the_cache_to_the_last_row():
    key_new, value_new, key, value = caches()
    length = ints(8, 8, 8)
    out, _ = update(key_new, value_new, length, make_plan(1, 1), ints(-1, -1, -1), key, value, layer=0)
    assert torch.equal(out, torch.cat([key[:, :, :8], key_new], dim=2))


def test_no_new_rows_only_compacts():
    key_new, value_new, key, value = caches()
    plan = make_plan(1, 1)
    out, _ = update(key_new[:, :, :0], value_new[:, :, :0], LENGTH, plan, KEEP, key, value, layer=0)
    assert torch.equal(out[0, :, :4], key[0][:, plan[0, 0, 0, :4].long()])
    assert torch.equal(out[1], key[1])


def test_an_empty_cache_takes_the_first_chunk():
    key_new, value_new, key, value = caches()
    length, keep = ints(0, 0, 0), ints(-1, -1, -1)
    out, _ = update(key_new, value_new, length, make_plan(1, 1), keep, key, value, layer=0)
    assert torch.equal(out[:, :, :NEW], key_new)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_of_the_cache(dtype):
    key_new, value_new, key, value = caches(dtype)
    out = update(key_new.float(), value_new.float(), LENGTH, make_plan(1, 1), KEEP, key, value, layer=0)
    assert {tensor.dtype for tensor in out} == {dtype}
    assert torch.equal(out[0][0, :, 4:6], key_new[0])
