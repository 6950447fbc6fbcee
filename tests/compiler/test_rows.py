"""Counting rows without asking the engine: what the engine itself does, over random steps."""

from pathlib import Path

import numpy as np
import pytest

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.rows import Rows
from keysieve.errors import EngineError
from support.bundles import tiny_bundle

EVICTION = EvictionConfig(PolicyConfig("key-norm"), budget=48, interval=16, sinks=2, recent=8)


def test_the_rows_of_the_engine(root: Path) -> None:
    engine = load(tiny_bundle("llama", EVICTION, root), threads=1)
    random = np.random.default_rng(0)
    session = engine.session(3, budget=[48, 30, 60], capacity=90)
    for _ in range(60):
        tokens = int(random.integers(1, 20))
        count = random.integers(0, tokens + 1, 3).astype(np.int32)
        session.step(random.integers(3, 300, (3, tokens)), count, np.zeros((3, 1), np.int64), 20)
        np.testing.assert_array_equal(session._rows.held, session.rows_of_classes)
    assert min(session.counters.rounds) >= 4


def manifest(**changes: object) -> dict[str, object]:
    eviction = {"interval": 16, "sinks": 2, "recent": 8}
    classes = [{"suffix": "", "kv_heads": 6, "budgets": [1], "shares": [1.0]}]
    return {"eviction": eviction, "classes": classes, "windows": [], "row_states": [], **changes}


def test_windows_keep_what_the_next_token_sees() -> None:
    rows = Rows(manifest(windows=[{"size": 24}]), 1, 64, 48, chunk=None, total=None)
    assert rows.window_rows == [24 - 1 + 16]
    for tokens in (16, 16, 7, *[1] * 40):
        limit = rows.limit(tokens, np.array([tokens]), 1)
        rows.advance(tokens, np.array([tokens]), limit)
        assert rows.window_held[0][0] <= 39 and rows.held[0, 0] <= 64
    with pytest.raises(EngineError, match="feed at most 16 tokens a step"):
        rows.limit(17, np.array([17]), 1)


def test_a_crowded_cache_evicts_before_its_limit() -> None:
    rows = Rows(manifest(), 1, 60, 48, chunk=None, total=None)
    rows.held[:] = 50
    assert rows.limit(1, np.array([1]), 16).tolist() == [[51]]  # 51 + 16 rows would not fit
    assert rows.limit(1, np.array([1]), 1).tolist() == [[61]]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((1, 0, 48), "capacity is 0"), ((1, 64, 10), "leaves no row to choose"), ((2, 64, [48] * 3), "3 budgets")],
    ids=str,
)
def test_sizes_that_cannot_be(sizes: tuple[int, int, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        Rows(manifest(), *sizes, chunk=None, total=None)


def test_no_budget_is_beyond_what_the_widest_class_can_count() -> None:
    with pytest.raises(EngineError, match="budget 99,999,999,999 is beyond 16,777,216 rows"):
        Rows(manifest(), 1, 64, 99_999_999_999, None, None)


@pytest.mark.parametrize("budget", [64.7, "64", [48.5]], ids=str)
def test_budgets_are_whole_numbers(budget: object) -> None:
    with pytest.raises(EngineError, match="is no whole number of rows"):
        Rows(manifest(), 1, 64, budget, None, None)  # type: ignore[arg-type]


def test_a_dense_capacity_is_not_held_to_the_most_of_a_budget() -> None:
    assert Rows(manifest(), 1, 1 << 30, None, None, None).sizes()["capacity"] == 1 << 30
