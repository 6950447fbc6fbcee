import json

import pytest
import torch

from keysieve.errors import ConfigError
from keysieve.kernels.reference import score, select
from support.golden import CASES, ints, load_case, score_inputs

SCOPES = ("per_layer_per_head", "per_head", "union")
INF, NAN = float("inf"), float("nan")


def pick(scores, budget, length=None, limit=0, pinned=0, scope="union", kv_heads=1, sinks=0, recent=0):
    """select() on a batch of one: scores [C] or [L, Hq, C] -> (kept rows [Lp][Hp], keep, evicted)."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    scores = scores.reshape(1, 1, 1, -1) if scores.ndim == 1 else scores[:, None]
    length = scores.shape[-1] if length is None else length
    plan, keep, evicted = select(
        scores, ints(length), ints(limit), ints(budget), ints(pinned), scope, kv_heads, sinks, recent
    )
    rows = max(int(keep), 0)
    assert not plan[..., rows:].any(), "zeros follow the kept rows"
    return plan[:, 0, :, :rows].tolist(), int(keep), int(evicted)


def rows_of(scores, budget, **options):
    return pick(scores, budget, **options)[0][0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "round_prefix"), [*((case, "") for case in CASES), (CASES[1], "r2_")], ids=[*CASES, "round2"]
)
def test_golden_keep_sets(name, round_prefix, dtype):
    case = load_case(name)
    k_rot, position = case[f"{round_prefix}k_rot"], int(case[f"{round_prefix}round_start"])
    inputs = score_inputs(case, position, k_rot, dtype)
    plan, keep, evicted = select(
        score(**inputs),
        inputs["length"],
        inputs["limit"],
        ints(int(case["budget"])),
        ints(int(case["prefix_length"])),
        scope=json.loads(str(case["meta"]))["mode"],
        kv_heads=k_rot.shape[1],
        sinks=0,
        recent=0,
    )
    budget = int(case["budget"])
    assert (int(keep), int(evicted)) == (budget, k_rot.shape[2] - budget)
    official = torch.from_numpy(case[f"{round_prefix}keep_indices"]).sort(-1).values
    assert torch.equal(plan[..., :budget].long().reshape(official.shape), official)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        # z-scores are the scores themselves: every head holds 8 rows of mean 0 and std 1 in its own order
        ("per_layer_per_head", [[[0, 1], [4, 5]], [[2, 3], [0, 4]]]),
        ("per_head", [[[0, 2], [0, 4]]]),
        ("union", [[[0, 2]]]),
    ],
)
def test_scopes(scope, expected):
    scores = torch.zeros(2, 4, 8)
    for layer, head, top, second in (
        (0, 0, 0, 7),
        (0, 1, 1, 6),
        (0, 2, 4, 3),
        (0, 3, 5, 2),
        (1, 0, 2, 6),
        (1, 1, 3, 7),
        (1, 2, 0, 7),
        (1, 3, 4, 1),
    ):
        scores[layer, head] = torch.arange(8) * -0.01
        scores[layer, head, second] = 0.5
        scores[layer, head, top] = 3 if head % 2 == 0 else 2.5
    found, keep, evicted = pick(scores, 2, scope=scope, kv_heads=2)
    assert (keep, evicted) == (2, 6)
    assert found == expected


def test_heads_count_alike_whatever_the_scale_of_their_scores():
    large, small = [1000.0, 0.0, 0.0, 0.0, 900.0], [0.0, 0.0, 0.01, 0.0, 0.0]
    assert rows_of([[large, small]], 2) == [0, 2]


@pytest.mark.parametrize(
    ("length", "keep", "evicted"), [(0, 0, 0), (1, 1, 0), (4, 4, 0), (5, 5, 0), (6, 5, 1), (8, 5, 3)]
)
def test_counters_and_rows_around_the_budget(length, keep, evicted):
    kept, found_keep, found_evicted = pick(torch.arange(8.0).flip(0), 5, length=length)
    assert (found_keep, found_evicted) == (keep, evicted)
    assert kept == [[list(range(keep))]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("budget", [0, 3, 6])
def test_the_budget_takes_effect(scope, budget):
    kept, keep, evicted = pick(torch.randn(2, 4, 9), budget, scope=scope, kv_heads=2, sinks=1, recent=1)
    assert (keep, evicted) == (budget, 9 - budget)
    for rows in (head for layer in kept for head in layer):
        assert len(set(rows)) == budget and rows == sorted(rows)


def test_not_due_keeps_everything():
    plan, keep, evicted = select(
        torch.randn(1, 1, 1, 8), ints(5), ints(6), ints(2), ints(0), "union", 1, sinks=0, recent=0
    )
    assert (int(keep), int(evicted)) == (-1, 0)
    assert not plan.any()


@pytest.mark.parametrize("scope", SCOPES)
def test_every_sequence_has_its_own_length_limit_budget_and_pinned_rows(scope):
    """One of three is not due; the others equal a batch of one."""
    scores = torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(3))
    length, limit, budget, pinned = ints(9, 7, 12), ints(9, 8, 10), ints(4, 5, 6), ints(0, 1, 3)
    plan, keep, evicted = select(scores, length, limit, budget, pinned, scope, 2, sinks=1, recent=2)
    assert keep.tolist() == [4, -1, 6]
    assert evicted.tolist() == [5, 0, 6]
    assert plan.dtype == keep.dtype == evicted.dtype == torch.int32
    for b in range(3):
        one = [t[b : b + 1] for t in (length, limit, budget, pinned)]
        alone, _, _ = select(scores[:, b : b + 1], *one, scope, 2, sinks=1, recent=2)
        assert torch.equal(plan[:, b : b + 1], alone)


def test_all_tied_keeps_the_lowest_rows():
    assert rows_of([2.5] * 8, 3) == [0, 1, 2]
    assert rows_of([0.1] * 1000, 400) == list(range(400))


@pytest.mark.parametrize("value", [0.1, 100.3, -7.7e5, 1e30])
@pytest.mark.parametrize("rows", [5, 999])
def test_the_z_score_of_constant_scores_is_zero(value, rows):
    """Neither NaN nor +-1 by rounding: the other head decides above 0, the lowest row elsewhere."""
    scores = torch.full((1, 2, rows), value)
    scores[0, 1] = -1
    scores[0, 1, 0] = -3
    scores[0, 1, -2:] = torch.tensor([5.0, 1.0])
    assert rows_of(scores, 3, kv_heads=1) == [0, rows - 2, rows - 1]


def test_a_std_below_the_floor_counts_as_the_floor():
    assert rows_of([[[0.0, 0.0, 0.0, 1e-8], [1.0, -1.0, 1.0, -1.0]]], 1) == [0]


def test_the_std_is_that_of_the_population():
    """Two finite scores of head 0 have z = 1, above sqrt(3/5) in head 1; the sample std would reverse it."""
    assert rows_of([[[1.0, 0.0] + [NAN] * 6, [0.0] * 3 + [1.0] * 5]], 1) == [0]


def test_ties_go_to_the_lowest_row():
    assert rows_of([0, 5, 1, 5, 1, 5, 1, 0], 4) == [1, 2, 3, 5]


def test_minus_zero_ties_with_zero():
    assert rows_of([-0.0, 0.0, -0.0, 0.0], 2) == [0, 1]
    assert rows_of([0.0, -0.0, 0.0, -0.0, -1.0], 2) == [0, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_are_not_finite_rank_last(bad):
    assert rows_of([bad, 1.0, bad, -5.0, 0.0, 3.0], 4) == [1, 3, 4, 5]
    assert rows_of([bad, 1.0, bad, -5.0, 0.0, 3.0], 5) == [0, 1, 3, 4, 5]
    assert rows_of([bad] * 5, 2) == [0, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_are_not_finite_stay_out_of_the_z_score(bad):
    """Two heads: the bad value of the first must not flatten or shift its other rows."""
    clean = torch.tensor([[[-4.0, 4.0, -4.0, 4.1, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0, 0.0, 0.2]]])
    dirty = torch.cat([clean, torch.tensor([[[bad], [0.05]]])], dim=-1)
    assert rows_of(clean, 3) == rows_of(dirty, 3) == [1, 3, 5]


def test_a_bad_candidate_is_kept_before_a_row_that_is_not_held():
    assert rows_of([1.0, NAN, 0.5, 9.0, 9.0], 3, length=3) == [0, 1, 2]
    assert rows_of([NAN, NAN, NAN, 9.0, 9.0], 2, length=3) == [0, 1]


@pytest.mark.parametrize("padding", [NAN, INF, 1e30])
def test_rows_not_held_are_neither_scored_nor_kept(padding):
    """Head 0 decides row 4 and head 1 row 2 only if the padding stays out of mean and std."""
    held = torch.tensor([[[0.0, 0.1, 0.0, 0.1, 0.9], [-3.0, 3.0, 8.0, 3.0, -3.0]]])
    padded = torch.cat([held, torch.full((1, 2, 4), padding)], dim=-1)
    assert rows_of(padded, 2, length=5) == rows_of(held, 2) == [2, 4]


@pytest.mark.parametrize("protection", [{"sinks": 2}, {"pinned": 2}, {"recent": 2}])
def test_protected_rows_stay_out_of_the_z_score(protection):
    """Large protected scores in head 0 would shrink the z of its best candidate below head 1's second."""
    head0, head1 = [0.0, 0.0, 9.0, 0.0, 0.0, 0.0], [5.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    wild = [1e5, -1e5]
    at_end = "recent" in protection
    scores = [[row + wild if at_end else wild + row for row in (head0, head1)]]
    expected = [2, 6, 7] if at_end else [0, 1, 4]
    assert rows_of(scores, 3, **protection) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sinks": 2}, [0, 1, 3, 4]),
        ({"pinned": 2}, [0, 1, 3, 4]),
        ({"sinks": 1, "pinned": 2}, [0, 1, 3, 4]),
        ({"sinks": 2, "pinned": 1}, [0, 1, 3, 4]),
        ({"recent": 2}, [3, 4, 6, 7]),
        ({"sinks": 1, "recent": 1}, [0, 3, 4, 7]),
        ({"recent": 2, "length": 7}, [3, 4, 5, 6]),
    ],
)
def test_protected_rows_stay(options, expected):
    assert rows_of([-1, -2, 0, 9, 8, -3, -4, -5], 4, **options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sinks": 5}, [0, 1, 2]),
        ({"pinned": 5}, [0, 1, 2]),
        ({"recent": 5}, [3, 4, 5]),
        ({"sinks": 2, "recent": 2}, [0, 1, 6]),
        ({"sinks": 99}, [0, 1, 2]),
        ({"recent": 99}, [0, 1, 2]),
    ],
)
def test_protected_rows_past_the_budget_keep_their_lowest(options, expected):
    assert rows_of(torch.arange(8.0), 3, **options) == expected


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_are_not_modified(scope):
    scores = torch.randn(2, 1, 4, 8)
    scores[0, 0, 0, 3] = NAN
    before = scores.clone()
    select(scores, ints(8), ints(8), ints(4), ints(0), scope, 2, sinks=1, recent=1)
    assert torch.equal(scores.nan_to_num(7.0), before.nan_to_num(7.0))


def test_unknown_scope_is_refused():
    with pytest.raises(ConfigError, match=r"global.*per_layer_per_head, per_head, union"):
        pick([1.0, 2.0], 1, scope="global")
