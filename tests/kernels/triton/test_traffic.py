"""The bytes of an eviction round, by hand for a small one, and within a tenth of the least possible for a real one."""

from dataclasses import replace

import pytest

from keysieve.kernels import SCOPES
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.report import MODELS, ROUND
from keysieve.kernels.triton.traffic import Round, minimum, traffic


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
    )
    work = Round(rows=300, budget=200, moved=100, capacity=310, batch=3, tokens=2)
    keys, moved_rows = 12 * 300 * 64 * 2, 12 * 100 * 96 * 2
    assert minimum(model, work) == keys + 2 * moved_rows
    score, stats, plan, update = traffic(model, work)
    assert (score.read, score.written) == (keys + 24 * 2 * (64 + 32) * 4, 24 * 300 * 4)
    assert (stats.read, stats.written) == (24 * 290 * 4, 24 * 12)
    assert (plan.read, plan.written) == (24 * 290 * 4 + 24 * 12 + 12 * 300 * 4, 12 * 300 * 4 + 12 * 310 * 4)
    appended = 12 * 2 * 96 * 2
    assert (update.read, update.written) == (12 * 3 * 200 * 4 + moved_rows + appended, moved_rows + appended)
    assert [one.launches for one in (score, stats, plan, update)] == [1, 1, 1, 2]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_round_of_the_large_model_moves_at_most_a_tenth_more_than_it_must(scope):
    model = replace(next(iter(MODELS.values())), scope=scope)
    moved = sum(one.read + one.written for one in traffic(model, ROUND))
    assert moved <= 1.1 * minimum(model, ROUND)
