"""The official TriAttention format: what is written, what is refused, and that no code of a file is run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler.official_statistics import load_official, save_official
from keysieve.compiler.statistics_file import read
from keysieve.errors import StatisticsError
from support.statistics import HEADS, IDENTITY, assert_same_layer, make, rope, ropes_of


@pytest.mark.parametrize("kind", ["half_split", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_official_round_trip(tmp_path, kind, rotary_dim):
    statistics = make(rope(kind, rotary_dim), rope(kind, rotary_dim))
    path = tmp_path / "stats.pt"
    save_official(statistics, path)
    assert list(tmp_path.iterdir()) == [path]
    found = read(path, IDENTITY, ropes_of(statistics), [HEADS, HEADS])
    assert found.model == IDENTITY and found.tokens == 0
    for entry, expected in zip(found.layers, statistics.layers, strict=True):
        rotary_only = expected.q_mean.copy()
        rotary_only[:, rotary_dim:] = 0
        assert_same_layer(entry, dataclasses.replace(expected, q_mean=rotary_only), atol=1e-6)


def test_official_layout(tmp_path):
    statistics = make(rope("interleaved"))
    save_official(statistics, tmp_path / "stats.pt")
    content = torch.load(tmp_path / "stats.pt", weights_only=True)
    assert content["metadata"] == {
        "head_dim": 16,
        "rope_style": "interleaved",
        "sampled_heads": [[0, 0], [0, 1], [0, 2], [0, 3]],
    }
    assert list(content["stats"]) == [f"layer00_head{head:02d}" for head in range(4)]
    entry, mean = content["stats"]["layer00_head02"], statistics.layers[0].q_mean[2]
    assert {tensor.dtype for tensor in entry.values()} == {torch.float32}
    np.testing.assert_allclose(entry["q_mean_real"].numpy(), mean[0::2], rtol=1e-6)
    np.testing.assert_allclose(entry["q_mean_imag"].numpy(), mean[1::2], rtol=1e-6)
    np.testing.assert_allclose(entry["q_abs_mean"].numpy(), statistics.layers[0].q_abs[2], rtol=1e-6)


def drop(*names):
    def change(content):
        for name in names:
            del content["stats"][name]

    return change


ALL_HEADS_OF_LAYER_1 = [f"layer01_head{head:02d}" for head in range(HEADS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("layer01_head02"), "layer 1, head 2 .* is missing"),
        (drop(*ALL_HEADS_OF_LAYER_1), "layer 1 is missing"),
        (
            lambda c: c["stats"].update(layer02_head00=c["stats"]["layer00_head00"]),
            "more than the model's 2 att",
        ),
        (
            lambda c: c["stats"].update(layer01_head04=c["stats"]["layer00_head00"]),
            "layer 1 has more than .*4 q",
        ),
        (lambda c: c["metadata"].update(head_dim=32), "layer 0: head_dim is 32 in the file and 16"),
        (
            lambda c: c["metadata"].update(rope_style="interleaved"),
            "rope_style is 'interleaved' .* and 'half'",
        ),
        (
            lambda c: c["stats"]["layer01_head01"].update(q_abs_mean=torch.ones(7)),
            r"layer 1, head 1: q_abs_mean has shape \[7\] instead of \[8\]",
        ),
        (
            lambda c: c["stats"]["layer01_head01"].update(q_abs_mean=torch.full((8,), torch.nan)),
            "layer 1: q_abs holds NaN",
        ),
        (lambda c: c["stats"]["layer01_head01"].pop("q_abs_mean"), "no TriAttention file.*q_abs_mean"),
        (lambda c: c.pop("stats"), "no TriAttention file.*stats"),
        (lambda c: c.update(stats=[1]), "no TriAttention file"),
    ],
)
def test_official_files_that_do_not_fit_are_an_error(tmp_path, change, message):
    path = tmp_path / "stats.pt"
    save_official(make(), path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(StatisticsError, match=rf"stats\.pt.*{message}"):
        load_official(path, IDENTITY, [rope(), rope()], [HEADS, HEADS])


def test_official_files_of_hybrid_models_call_layers_by_their_numbers(tmp_path):
    path, whole = tmp_path / "stats.pt", make(rope(), rope(), rope())
    save_official(whole, path)
    found = load_official(path, IDENTITY, [rope(), rope()], [HEADS, HEADS], layers=[0, 2])
    assert [entry.layer for entry in found.layers] == [0, 2]
    np.testing.assert_allclose(found.layers[1].q_abs, whole.layers[2].q_abs, rtol=1e-6)
    with pytest.raises(StatisticsError, match="layer 3 is missing"):
        load_official(path, IDENTITY, [rope()], [HEADS], layers=[3])


def test_official_files_are_read_without_running_code(tmp_path):
    path = tmp_path / "stats.pt"
    torch.save({"metadata": {}, "stats": Path("x")}, path)
    with pytest.raises(StatisticsError, match="no readable TriAttention file"):
        load_official(path, IDENTITY, [rope()], [HEADS])


def test_the_official_format_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "stats.pt"
    for forms in ((rope(), rope("nope", 0)), (rope("nope", 0),), (rope(), rope("interleaved"))):
        with pytest.raises(StatisticsError, match="keep the safetensors statistics"):
            save_official(make(*forms), path)
    save_official(make(rope()), path)
    with pytest.raises(StatisticsError, match="layer 0 has no RoPE"):
        load_official(path, IDENTITY, [rope("nope", 0)], [HEADS])
