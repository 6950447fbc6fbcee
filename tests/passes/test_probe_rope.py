"""The rotation that probing must find: what a model does, and pairs of dims turned wherever they are."""

import numpy as np
import pytest
import torch

from keysieve.passes.probe_rope import rotation_matrix
from keysieve.passes.rope_form import RopeForm
from support.graphs import matched


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "llama_yarn"])
def test_rotation_matrix_is_what_the_model_does(name):
    """The form, applied to the model's own pre-RoPE queries, gives the model's own attention queries."""
    found = matched(name)
    tokens = torch.randint(3, 300, (2, 9))
    positions = torch.stack([torch.arange(9), torch.arange(500, 509)])
    given = {found.graph.inputs["input_ids"]: tokens, found.graph.inputs["position_ids"]: positions}
    for rope in found.ropes:
        pre = found.graph.evaluate(rope.query_pre, given)
        post = found.graph.evaluate(rope.attention.query, given)
        if pre.shape != post.shape:
            pre = pre.transpose(1, 2)
        for b, s in ((0, 0), (0, 8), (1, 4)):
            matrix = torch.from_numpy(rotation_matrix(rope.form, int(positions[b, s])))
            torch.testing.assert_close(pre[b, :, s] @ matrix.T, post[b, :, s], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["half_split", "interleaved"])
def test_rotation_matrix_turns_pairs(kind):
    form = RopeForm(kind, 6, 4, np.array([1.0, 0.25]), 2.0)
    matrix = rotation_matrix(form, 3)
    x = np.arange(1.0, 7)
    real, imaginary = form.pairs
    pairs = 2 * (x[real] + 1j * x[imaginary]) * np.exp(3j * form.inv_freq)
    found = matrix @ x
    np.testing.assert_allclose(found[real] + 1j * found[imaginary], pairs, rtol=1e-12)
    np.testing.assert_array_equal(found[4:], x[4:])
    assert str(form) == f"{kind} partial 4/6 scaling 2"


def test_any_pairing_and_its_arrangement():
    """Even/odd pairs of the last four dims go in, halves come out; the first two are not turned."""
    form = RopeForm.of_pairs((2, 4), (3, 5), (0, 1, 2, 4, 3, 5), np.array([1.0, 0.25]), 2.0)
    assert (form.kind, form.rotary_dim, str(form)) == ("paired", 4, "paired partial 4/6 scaling 2")
    x = np.arange(1.0, 7)
    turned = 2 * np.array([3 + 4j, 5 + 6j]) * np.exp(3j * form.inv_freq)
    rotated = rotation_matrix(form, 3) @ x
    np.testing.assert_allclose(rotated, [1, 2, *turned.real, *turned.imag], rtol=1e-12)
    before, after = form.arranged
    np.testing.assert_array_equal(x[before], [3, 5, 4, 6, 1, 2])
    np.testing.assert_allclose(rotated[after], [*turned.real, *turned.imag, 1, 2], rtol=1e-12)


@pytest.mark.parametrize("kind", ["half_split", "interleaved"])
def test_usual_pairings_are_called_by_their_names(kind):
    known = RopeForm(kind, 6, 4, np.array([1.0, 0.25]))
    real, imaginary = (tuple(map(int, side)) for side in known.pairs)
    form = RopeForm.of_pairs(real, imaginary, tuple(range(6)), known.inv_freq)
    assert (form.kind, form.real, form.layout) == (kind, (), ())
    other = RopeForm.of_pairs(real, imaginary, (1, 0, 2, 3, 4, 5), known.inv_freq)
    assert other.kind == "paired"
