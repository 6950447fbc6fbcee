"""Statistics of random queries, and whether two layers of them are the same."""

import numpy as np
import torch

from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.statistics import Statistics
from keysieve.passes.rope_form import RopeForm

HEADS = 4
IDENTITY = {
    "architecture": "LlamaForCausalLM",
    "config_sha256": "c0",
    "weights_sha256": "aa",
    "layers": 2,
    "query_heads": HEADS,
    "kv_heads": 2,
    "head_dim": 16,
}


def rope(kind="half_split", rotary_dim=16, scaling=1.0, theta=1e4):
    return RopeForm(kind, 16, rotary_dim, theta ** (-np.arange(0, rotary_dim, 2) / max(rotary_dim, 1)), scaling)


def paired():
    """Even/odd pairs of the last four dims go in, halves come out."""
    layout = (*range(12), 12, 14, 13, 15)
    return RopeForm.of_pairs((12, 14), (13, 15), layout, np.array([1.0, 0.1]))


def queries(tokens=40, batch=2, seed=0, heads=HEADS, dim=16):
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed)) + 0.5


def gather(form, layer=0, q=None):
    moments = QueryMoments(form, HEADS, layer)
    moments.add(queries(seed=layer) if q is None else q)
    return moments.finish()


def make(*forms):
    forms = forms or (rope(), rope())
    layers = [gather(form, layer) for layer, form in enumerate(forms)]
    return Statistics(layers, 80, 100, "feed", dict(IDENTITY))


def ropes_of(statistics):
    return [entry.rope for entry in statistics.layers]


def assert_same_layer(found, expected, atol=0.0):
    assert (found.layer, str(found.rope), found.rope.kind) == (
        expected.layer,
        str(expected.rope),
        expected.rope.kind,
    )
    for name in ("head_dim", "rotary_dim", "real", "imaginary", "layout"):
        assert getattr(found.rope, name) == getattr(expected.rope, name)
    assert found.rope.scaling == expected.rope.scaling
    np.testing.assert_allclose(found.rope.inv_freq, expected.rope.inv_freq, rtol=0, atol=0)
    np.testing.assert_allclose(found.q_mean, expected.q_mean, rtol=0, atol=atol)
    np.testing.assert_allclose(found.q_abs, expected.q_abs, rtol=0, atol=atol)
