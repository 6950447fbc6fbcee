"""The select kernels, in Triton's interpreter and on a GPU: the very plan of the reference."""

import pytest
import torch

from keysieve.kernels import SCOPES
from keysieve.kernels.reference import select
from keysieve.kernels.reference.select import standardise
from keysieve.kernels.triton.configuration import KernelConfiguration


def configuration(**changes):
    values = {"layers": 2, "query_heads": 4, "kv_heads": 2, "sinks": 2, "recent": 5} | changes
    return KernelConfiguration(head_dim=8, value_dim=8, rotary_dim=8, dtype="float32", **values)


def attributes(model):
    return {name: getattr(model, name) for name in ("scope", "kv_heads", "sinks", "recent")}


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def check(kernels, model, scores, length, budget, limit=None, pinned=None, **more):
    given = {
        "scores": scores,
        "length": ints(length),
        "limit": ints(limit or [0] * len(length)),
        "budget": ints(budget),
        "pinned": ints(pinned or [0] * len(length)),
        **more,
    }
    batch, capacity = scores.shape[1], scores.shape[3]
    written = {"plan": torch.full((model.plan_layers, batch, model.plan_heads, capacity), -1, dtype=torch.int32)}
    written |= {name: torch.empty(batch, dtype=torch.int32) for name in ("keep", "evicted")}
    _, after = kernels("select_", **given, **written, **attributes(model))
    plan, keep, evicted = (after[name] for name in written)
    want = select(**given, **attributes(model))
    assert torch.equal(keep, want[1])
    assert torch.equal(evicted, want[2])
    due = given["length"] >= given["limit"]
    assert torch.equal(plan[:, due], want[0][:, due])
    assert (plan[:, ~due] == -1).all()  # not touched


def random_scores(model, batch, capacity):
    return torch.randn(model.layers, batch, model.query_heads, capacity)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
def test_random_scores(kernels, scope, query_heads, kv_heads):
    model = configuration(scope=scope, query_heads=query_heads, kv_heads=kv_heads)
    check(kernels, model, random_scores(model, 1, 333), length=[300], budget=[200])


@pytest.mark.parametrize("scope", SCOPES)
def test_utilities_are_added_to_what_the_scores_say(kernels, scope):
    model = configuration(scope=scope, query_heads=6, kv_heads=2)
    utility = 3 * torch.randn(2 * 3, 2, 200, 1)
    for row, value in ((20, torch.nan), (21, torch.inf), (22, -torch.inf)):
        utility[:, :, row] = value
    scores = random_scores(model, 3, 200)
    check(kernels, model, scores, [190, 10, 150], [60, 60, 40], limit=[0, 100, 0], utility=utility)


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_batches(kernels, scope):
    model = configuration(scope=scope)
    check(kernels, model, random_scores(model, 3, 120), [110, 119, 90], [60, 31, 90], pinned=[0, 7, 40])


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_several_blocks(kernels, scope):
    model = configuration(scope=scope, layers=2, query_heads=2)
    check(kernels, model, random_scores(model, 1, 2300), length=[2176], budget=[2048])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 49, 50, 51, 90])
def test_lengths_around_the_budget(kernels, length):
    model = configuration()
    check(kernels, model, random_scores(model, 1, 90), length=[length], budget=[50])


def test_one_due_of_three(kernels):
    model = configuration()
    check(kernels, model, random_scores(model, 3, 60), [50, 50, 50], [20, 20, 20], limit=[51, 50, 60])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.1],
        [-0.0, 0.0],
        [1.0, 1.0, 2.0],
        [torch.nan],
        [torch.inf, -torch.inf],
        [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 3.0],
        [3.3e38, -3.3e38],
        [1e30, 2e30, -1e30],
        [1e-42, 2e-42, 0.0],
    ],
    ids=str,
)
def test_ties_and_special_values(kernels, scope, values):
    model = configuration(scope=scope, query_heads=2)
    # The same scores in every head: ties between heads are then exact, however the sums are rounded.
    pattern = torch.tensor(values)[torch.randint(len(values), (60,))]
    check(kernels, model, pattern.expand(model.layers, 1, 2, 60).contiguous(), length=[57], budget=[30])


@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_that_tie_but_for_rounding(kernels, scope):
    """Heads whose z-scores agree in all but the last bit: what is chosen instead is as good, to 1e-6."""
    model = configuration(scope=scope)
    scores = torch.randint(3, (2, 1, 4, 60)).float()
    given = {"scores": scores, "length": ints([60]), "limit": ints([0]), "budget": ints([30]), "pinned": ints([0])}
    (plan, _, _), _ = kernels("select", **given, **attributes(model))
    candidate = (torch.arange(60) >= model.sinks) & (torch.arange(60) < 60 - model.recent)
    z = standardise(scores.double(), candidate.expand_as(scores)).view(2, 1, 2, 2, 60).amax(3)
    ranks = {"per_layer_per_head": z, "per_head": z.mean(0, keepdim=True), "union": z.amax((0, 2), keepdim=True)}[scope]
    ranks = ranks.masked_fill(~candidate, torch.inf)
    kept = ranks.gather(3, plan[..., :30].long())
    assert (plan[..., 1:30] > plan[..., :29]).all()
    assert torch.allclose(kept.sort(descending=True).values, ranks.sort(descending=True).values[..., :30], atol=1e-6)


def test_ties_across_blocks_take_the_lowest_rows(kernels):
    model = configuration(query_heads=2, layers=1)
    scores = torch.zeros(1, 1, 2, 2500)
    scores[..., 1500:1600] = 1.0
    check(kernels, model, scores, length=[2400], budget=[1400])


@pytest.mark.parametrize("budget", [0, 1, 6, 7, 60, 100])
def test_budgets_below_the_protected_rows_and_above_the_length(kernels, budget):
    model = configuration()
    check(kernels, model, random_scores(model, 1, 60), length=[55], budget=[budget])


@pytest.mark.parametrize(("sinks", "recent", "pinned"), [(0, 0, 0), (0, 0, 13), (4, 0, 2), (0, 60, 0), (3, 9, 70)])
def test_protected_rows(kernels, sinks, recent, pinned):
    model = configuration(sinks=sinks, recent=recent)
    check(kernels, model, random_scores(model, 1, 60), length=[55], budget=[25], pinned=[pinned])
