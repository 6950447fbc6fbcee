"""Labels against a direct computation, ridge against lstsq on the whole design matrix, and sums that add up."""

import numpy as np
import pytest
import torch

from keysieve.compiler import gate_sums
from keysieve.compiler.gate_sums import correlation, fit_sums, gate, regression_sums, retention_labels, solve
from keysieve.errors import StatisticsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, 0.0])])
def test_labels_are_the_highest_probability_of_a_later_query(block, softcap, sinks, monkeypatch):
    monkeypatch.setattr(gate_sums, "BLOCK", block)
    query, key = torch.randn(4, 17, 8) * 2, torch.randn(2, 17, 8) * 2
    found = retention_labels(query, key, 6, 9, 0.3, softcap, sinks)
    assert found.shape == (6, 2)
    for group in range(2):
        best = np.zeros(6)
        for head in (2 * group, 2 * group + 1):
            for token in range(9, 17):
                logits = [0.3 * float(query[head, token] @ key[group, n]) for n in range(token + 1)]
                if softcap:
                    logits = [softcap * np.tanh(x / softcap) for x in logits]
                total = sum(np.exp(logits)) + (np.exp(float(sinks[head])) if sinks is not None else 0)
                best = np.maximum(best, np.exp(logits[:6]) / total)
        np.testing.assert_allclose(found[:, group], np.log(1e-6 + best), rtol=0, atol=1e-5)


def test_labels_of_keys_that_nobody_reads_stay_finite():
    query, key = torch.zeros(1, 6, 4), torch.zeros(1, 6, 4)
    query[:, 3:, 0], key[:, 0, 0], key[:, 3:, 0] = 1000.0, -1000.0, 1000.0
    assert retention_labels(query, key, 2, 3, 1.0)[0, 0] == pytest.approx(np.log(1e-6))


def contexts(count=3):
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(20, 5, generator=generator) * torch.arange(1.0, 6) + 3 for _ in range(count)]
    mixed = torch.randn(5, 2, generator=generator)
    return [(h, h @ mixed - 4 + 0.1 * torch.randn(20, 2, generator=generator)) for h in hidden]


def added(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def test_the_gate_is_ridge_regression_on_the_whole_design_matrix():
    texts = contexts()
    weight, bias = solve(added([regression_sums(*text) for text in texts]), 0)
    x, y = (torch.cat(side).double().numpy() for side in zip(*texts, strict=True))
    ridge = len(x) * gate_sums.RIDGE * x.var(0).mean()
    design = np.block([[x, np.ones((len(x), 1))], [np.sqrt(ridge) * np.eye(5), np.zeros((5, 1))]])
    wanted = np.linalg.lstsq(design, np.concatenate([y, np.zeros((5, 2))]), rcond=None)[0]
    assert weight.dtype == bias.dtype == np.float32
    np.testing.assert_allclose(weight.T, wanted[:5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, wanted[5], rtol=1e-5)


def test_sums_add_up():
    texts = contexts()
    whole = regression_sums(*(torch.cat(side) for side in zip(*texts, strict=True)))
    for name, value in added([regression_sums(*text) for text in texts]).items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, whole[name], rtol=1e-12)


def test_correlation_is_that_of_numpy():
    texts = contexts()
    weight, bias = solve(regression_sums(*texts[0]), 0)
    rest = [(gate(hidden, weight, bias), labels) for hidden, labels in texts[1:]]
    found = correlation(added([fit_sums(*both) for both in rest]))
    predicted, labels = (torch.cat(side).numpy() for side in zip(*rest, strict=True))
    wanted = [np.corrcoef(predicted[:, head], labels[:, head])[0, 1] for head in range(2)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_constant_label_correlates_with_nothing():
    assert correlation(fit_sums(torch.randn(9, 1), torch.ones(9, 1))).tolist() == [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hidden_states_that_are_not_finite_name_the_layer(bad):
    hidden, labels = contexts(1)[0]
    hidden[3, 1] = bad
    with pytest.raises(StatisticsError, match="layer 7: its gate holds NaN"):
        solve(regression_sums(hidden, labels), 7)


def test_no_context_is_an_error():
    sums = {name: value * 0 for name, value in regression_sums(*contexts(1)[0]).items()}
    with pytest.raises(StatisticsError, match="layer 2: no context"):
        solve(sums, 2)
