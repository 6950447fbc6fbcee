"""The bytes of an eviction round, by hand for a small one, and within a tenth of the least possible for a real one."""

from dataclasses import replace

import pytest

from keysieve.kernels import SCOPES
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.report import MODELS, ROUND
from keysieve.kernels.triton.traffic import Round, attention, held, minimum, traffic


def test_by_hand():
    model = KernelConfiguration(
        layers=2,
        query_heads=4,
        kv_heads=2,
        head_dim=64,
        value_dim=32,
        rotary_dim=64,
        dtype="float16",
        sinks=1,
        recent=9,
        scope="per_head",
    )
    work = Round(rows=300, budget=200, moved=100, capacity=310, batch=3, tokens=2)
    keys, moved_rows = 12 * 300 * 64 * 2, 12 * 100 * 96 * 2
    assert minimum(model, work) == keys + 2 * moved_rows
    score, stats, plan, update = traffic(model, work)
    assert (score.read, score.written) == (keys + 24 * 2 * (64 + 32) * 4, 24 * 300 * 4)
    assert (stats.read, stats.written) == (24 * 290 * 4, 24 * 12)
    assert (plan.read, plan.written) == (24 * 290 * 4 + 24 * 12 + 6 * 300 * 4, 6 * 300 * 4 + 6 * 310 * 4)
    appended = 12 * 2 * 96 * 2
    assert (update.read, update.written) == (12 * 3 * 200 * 4 + moved_rows + appended, moved_rows + appended)
    assert [one.launches for one in (score, stats, plan, update)] == [1, 1, 1, 2]
    _, plan, _ = traffic(replace(model, scope="per_layer_per_head"), work)
    assert (plan.read, plan.written) == (24 * 290 * 4 + 12 * 300 * 4, 12 * 300 * 4 + 12 * 310 * 4)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_round_of_the_large_model_moves_at_most_a_tenth_more_than_it_must(scope):
    model = replace(next(iter(MODELS.values())), scope=scope)
    moved = sum(one.read + one.written for one in traffic(model, ROUND))
    assert moved <= 1.1 * minimum(model, ROUND)


def test_the_attention_by_hand():
    """Two KV heads of three query heads each, 700 rows of a capacity for 32 of the 35 shares that would be wanted."""
    model = KernelConfiguration(1, 6, 2, 64, 32, 64, "float16")
    moved = attention(model, 1, 700, 4096, processors=35)
    keys_and_values = 2 * 700 * (64 + 32) * 2
    assert held(model, 1, 700) == keys_and_values
    left_behind = 2 * 6 * 3 * (32 + 2) * 4  # by 6 programs of 117 to 128 rows, for each KV head
    assert moved.read == keys_and_values + 6 * 2 * 3 * 64 * 2 + 2 * 6 * 8 + left_behind
    assert moved.written == 6 * 32 * 2 + left_behind
    alone = attention(model, 1, 100, 4096, processors=35)
    assert alone.written == 6 * 32 * 2


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("rows", "capacity"), [(2176, 2304), (2176, 32768), (32768, 32896)])
@pytest.mark.parametrize("title", MODELS)
def test_decoding_reads_hardly_more_than_the_keys_and_values_held(title, batch, rows, capacity):
    model = MODELS[title]
    assert attention(model, batch, rows, capacity, processors=132).read <= 1.05 * held(model, batch, rows)
