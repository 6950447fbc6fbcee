"""How many heads hold each token, and the share that none holds any more."""

import numpy as np

from keysieve.compiler.holders import count_holders, forgotten_share


def test_a_token_counts_as_held_if_any_head_of_any_layer_and_plan_holds_it() -> None:
    # Two sequences, two layers, one head: [L*B,Hkv,C,1]; rows past the length mean nothing.
    first = np.array([[[0, 1, 9]], [[0, 9, 9]], [[0, 3, 9]], [[2, 9, 9]]], np.float32)[..., None]
    second = np.array([[[5, 9, 9]], [[0, 9, 9]]], np.float32)[..., None]
    held = [(first, np.array([2, 1])), (second, np.array([1, 1]))]
    holders = count_holders(held, np.array([8, 4]))
    assert holders == [[2, 1, 0, 1, 0, 1, 0, 0], [2, 0, 1, 0]]
    assert list(map(forgotten_share, holders)) == [1 - 4 / 8, 1 - 2 / 4]


def test_before_any_token_nothing_is_forgotten() -> None:
    assert count_holders([(np.zeros((1, 1, 4, 1), np.float32), np.array([0]))], np.array([0])) == [[]]
    assert forgotten_share([]) == 0
