"""Classes of heads: which heads share a budget, and how an average is divided among them."""

import itertools

import numpy as np
import pytest

from keysieve.compiler.head_classes import CHOICE, class_budgets, classify, uniform
from keysieve.errors import ConfigError

SHARES = [np.array([[0.5, 2.0, 0.6], [0.7, 1.6, 0.8]]), np.array([[0.5, 0.4, 2.1], [0.7, 0.6, 1.7]])]
BUDGETS = [256, 512]


def test_classes_are_those_of_the_least_squares() -> None:
    """Against all ways to cut the sorted rows into so many runs."""
    random = np.random.default_rng(0)
    for most in (1, 2, 3):
        values = random.random(9) + 0.5
        values /= values.mean()
        found = classify([values[None]], [256], 256, most, 0)
        order = np.sort(values)

        def squares(cuts: tuple[int, ...], order: np.ndarray = order) -> float:
            return sum(float(part.var() * len(part)) for part in np.split(order, cuts))

        best = min(squares(cuts) for cuts in itertools.combinations(range(1, 9), most - 1))
        groups = [values[np.array(found.of_heads[0]) == each] for each in range(most)]
        assert sum(float(group.var() * len(group)) for group in groups) == pytest.approx(best)
        assert [group.mean() for group in groups] == pytest.approx([one[0] for one in found.shares])
        assert sorted(found.shares) == found.shares


def test_shares_are_interpolated_and_the_total_is_that_of_the_average() -> None:
    classes = classify(SHARES, BUDGETS, 256, 2, 0)
    assert classes.of_heads == [[0, 1, 0], [0, 0, 1]]
    entries = classes.entries()
    assert [each["kv_heads"] for each in entries] == [4, 2] and [each["suffix"] for each in entries] == ["_0", "_1"]
    rows = class_budgets(entries, np.array([256, 384, 512, 4096]), 0)
    assert rows.shape == (2, 4)
    np.testing.assert_allclose([4, 2] @ rows / 6, [256, 384, 512, 4096], rtol=0.01)
    wide = rows[1] / [256, 384, 512, 4096]
    assert wide[0] > wide[1] > wide[2] == pytest.approx(wide[3], abs=0.01)


@pytest.mark.parametrize("average", [133, 150, 164, 165, 200, 1000])
def test_no_class_gets_less_than_the_protected_rows_and_a_choice(average: int) -> None:
    entries = classify(SHARES, BUDGETS, 256, 4, 132).entries()
    rows = class_budgets(entries, np.array([average]), 132)[:, 0]
    assert rows.min() >= min(average, 132 + CHOICE)
    total = sum(each["kv_heads"] * held for each, held in zip(entries, rows, strict=True))
    assert abs(total / (6 * average) - 1) < 0.02


def test_one_class_has_the_average() -> None:
    entries = uniform([2, 2, 3]).entries()
    assert entries == [{"suffix": "", "kv_heads": 7, "budgets": [1], "shares": [1.0]}]
    assert class_budgets(entries, np.array([48, 300]), 10).tolist() == [[48, 300]]
    assert classify(SHARES, BUDGETS, 256, 1, 0).entries()[0]["suffix"] == ""


def test_without_layers_that_evict_there_is_no_class() -> None:
    assert uniform([]).entries() == [] and class_budgets([], np.array([5]), 0).shape == (0, 1)


def test_there_is_at_least_one_class() -> None:
    with pytest.raises(ConfigError, match="head classes are 0"):
        classify(SHARES, BUDGETS, 256, 0, 0)
