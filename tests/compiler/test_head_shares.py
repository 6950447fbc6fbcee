"""Scores are those of the kernels' reference, and rows compete as a sort by hand says."""

import numpy as np
import pytest
import torch

from keysieve.compiler import head_shares
from keysieve.compiler.head_shares import FLOOR, row_values, rows_held, trig_scores, usable_budgets
from keysieve.kernels.reference.score import score
from keysieve.passes.probe_rope import rotation_matrix
from keysieve.passes.rope_form import RopeForm

pytestmark = pytest.mark.usefixtures("one_thread")

FREQUENCIES = 100.0 ** (-np.arange(3) / 3)


@pytest.mark.parametrize("kind", ["half_split", "interleaved"])
@pytest.mark.parametrize("scaling", [1.0, 1.2])
def test_scores_are_those_of_the_reference_kernel(kind, scaling):
    form = RopeForm(kind, 8, 6, FREQUENCIES, scaling)
    query, plain = torch.randn(4, 11, 8) + 1, torch.randn(2, 11, 8)
    turns = np.stack([rotation_matrix(form, position) for position in range(11)])
    key = torch.einsum("noi,hni->hno", torch.from_numpy(turns).float(), plain)
    centre, magnitude = np.zeros((4, 8)), np.zeros((4, 3))
    decay, (real, imaginary) = 0.5 ** (1 / 128), form.pairs
    for token in query.double().numpy().transpose(1, 0, 2):
        centre = decay * centre + (1 - decay) * token
        magnitude = decay * magnitude + (1 - decay) * np.hypot(token[:, real], token[:, imaginary])
    turned = np.mean([centre @ rotation_matrix(form, 11 + offset).T for offset in head_shares.OFFSETS], 0)
    weight = scaling * (magnitude - np.hypot(centre[:, real], centre[:, imaginary]))
    wanted = score(
        torch.tensor([11]), torch.tensor([1]), torch.tensor([11]),
        torch.from_numpy(turned)[None, None, :, None], torch.from_numpy(weight)[None, None], [key[None]],
        "trig", 4, 6, kind == "interleaved",
    )  # fmt: skip
    torch.testing.assert_close(trig_scores(query, key, form).double(), wanted[0, 0], rtol=1e-4, atol=1e-4)


def test_another_pairing_scores_as_half_split():
    """The same head with its dims in another order before and after RoPE."""
    plain = RopeForm("half_split", 6, 6, FREQUENCIES)
    layout = (5, 3, 1, 0, 2, 4)
    other = RopeForm("paired", 6, 6, FREQUENCIES, 1.0, (0, 1, 2), (3, 4, 5), layout)
    query, key = torch.randn(2, 9, 6), torch.randn(1, 9, 6)
    torch.testing.assert_close(trig_scores(query, key[..., layout], other), trig_scores(query, key, plain))


def test_layers_without_rope_score_by_the_product_with_the_centre():
    form = RopeForm("nope", 6, 0, np.zeros(0))
    query, key = torch.randn(2, 9, 6), torch.randn(1, 9, 6)
    weights = 0.5 ** (torch.arange(8, -1, -1) / 128) * (1 - 0.5 ** (1 / 128))
    centre = (weights[:, None] * query).sum(1)
    torch.testing.assert_close(trig_scores(query, key, form), centre @ key[0].T)


def test_values_are_gate_plus_standardised_score():
    gate, scores = torch.randn(200, 2), torch.randn(4, 200)
    found = row_values(gate, scores)
    rows = scores[:, 4:72].numpy()
    z = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
    best = z.reshape(2, 2, -1).max(1)
    wanted = gate[4:72].T.numpy() + (best - best.mean(1, keepdims=True)) / best.std(1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_best_rows_win_and_floors_hold():
    values = [torch.randn(2, 300), torch.randn(3, 300) + 2]
    values[1][2] -= 100
    held = rows_held(values, 250)
    assert [len(layer) for layer in held] == [2, 3]
    assert sum(layer.sum() for layer in held) == 5 * 250
    assert held[1][2] == FLOOR  # its rows are worth nothing
    assert min(layer.min() for layer in held) >= FLOOR and max(layer.max() for layer in held) > 300
    rows = sorted(float(v) for layer in values for head in layer for v in head.sort(descending=True).values[32:])
    threshold = rows[-5 * (250 - FLOOR)]
    for layer, counts in zip(values, held, strict=True):
        for head, count in zip(layer, counts, strict=True):
            assert count == FLOOR - 32 + max(32, int((head >= threshold).sum()))


def test_no_head_holds_more_than_there_is():
    held = rows_held([torch.randn(2, 100), torch.randn(1, 100)], 10_000)
    assert np.concatenate(held).tolist() == [232.0] * 3


def test_budgets_need_room_above_the_floor_and_below_the_text():
    assert usable_budgets((128, 164, 165, 256, 512, 1024), 1024) == [165, 256, 512]
    assert usable_budgets((256, 512), 300) == []
