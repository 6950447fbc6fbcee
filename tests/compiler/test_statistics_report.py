"""The report on statistics: what R and drift are, what is dead, who is named, and a picture that can be read."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from keysieve.compiler import statistics_file
from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.statistics import LayerStatistics, Learned, Statistics
from keysieve.compiler.statistics_report import statistics_report, write_report
from keysieve.errors import ConfigError, StatisticsError
from keysieve.passes.rope_form import RopeForm

SVG = "{http://www.w3.org/2000/svg}"


def rope(rotary_dim: int = 4, head_dim: int = 6) -> RopeForm:
    kind = "half_split" if rotary_dim else "nope"
    return RopeForm(kind, head_dim, rotary_dim, 0.1 ** np.arange(rotary_dim // 2))


def layer(number: int, means: list[list[complex]], magnitudes: list[list[float]]) -> LayerStatistics:
    """A layer of two bands with these values a head."""
    mean = np.array(means)
    q_mean = np.concatenate([mean.real, mean.imag, np.full((len(means), 2), 7.0)], axis=1)
    return LayerStatistics(number, rope(), q_mean, np.array(magnitudes))


def nope(number: int) -> LayerStatistics:
    return LayerStatistics(number, rope(0), np.ones((2, 6)), np.zeros((2, 0)))


FIRST = layer(0, [[3 + 4j, 0], [1, 1j]], [[10, 2], [4, 4]])
SECOND = layer(1, [[0.2, 0.1], [0.1, 0]], [[1, 1], [1, 1]])
DEAD = layer(2, [[0, 0], [0, 0]], [[0, 0], [0, 0]])


def statistics(*layers: LayerStatistics, **options: object) -> Statistics:
    return Statistics(list(layers), 300, 400, "feed", {"architecture": "Some<Model>"}, 100, **options)  # type: ignore[arg-type]


def test_resultant_is_weighted_by_amplitude() -> None:
    report = statistics_report(statistics(FIRST, nope(1), SECOND))
    assert report.layers[0].resultant == pytest.approx((5 + 0 + 1 + 1) / 20)
    assert report.layers[0].bands == pytest.approx([(5 + 1) / 14, (0 + 1) / 6])
    assert report.layers[2].resultant == pytest.approx(0.4 / 4)
    assert report.resultant == pytest.approx((7 + 0.4) / 24)
    assert (report.layers[1].resultant, report.layers[1].drift, report.layers[1].bands) == (None, None, [])
    assert (report.tokens, report.tokens_planned, report.tokens_by_half, report.drift) == (300, 400, [], None)
    weighted = (FIRST.resultant * FIRST.q_abs).sum() / FIRST.q_abs.sum()
    assert report.layers[0].resultant == pytest.approx(weighted)


def test_drift_is_the_way_from_half_to_half() -> None:
    half = layer(0, [[6 + 4j, 0], [1, 1j]], [[10, 2], [4, 4]])  # over 100 of 300 tokens: the other 200 have 1.5 + 4j
    report = statistics_report(statistics(FIRST, first_half=[half], first_tokens=100))
    assert report.tokens_by_half == [100, 200]
    assert report.drift == report.layers[0].drift == pytest.approx(4.5 / 20)
    still = statistics_report(statistics(FIRST, first_half=[FIRST], first_tokens=100))
    assert still.drift == pytest.approx(0, abs=1e-12)


def test_dead_bands_have_no_weight_and_no_nan(tmp_path: Path) -> None:
    queries = torch.randn(1, 2, 50, 6)
    queries[:, 0] = 0  # one head
    queries[:, 1, :, [1, 3]] = 0  # one band of the other
    moments = QueryMoments(rope(), 2)
    moments.add(queries)
    some = moments.finish()
    assert some.resultant[0].tolist() == [0, 0] and some.resultant[1, 1] == 0 < some.resultant[1, 0]
    alive = np.abs(some.q_mean[1, 0] + 1j * some.q_mean[1, 2]) / some.q_abs[1, 0]
    whole = statistics(some, DEAD, nope(3), first_half=[some, DEAD, nope(3)], first_tokens=100)
    report = statistics_report(whole)
    assert [fit.dead for fit in report.layers] == [3, 4, 0]
    assert report.resultant == report.layers[0].resultant == pytest.approx(alive)
    assert (report.layers[1].resultant, report.layers[1].drift, report.layers[1].bands) == (0, 0, [0, 0])
    for name in ("report.svg", "report.json"):
        write_report(report, tmp_path / name)
        assert "nan" not in (tmp_path / name).read_text().lower()
    statistics_file.save(whole, tmp_path / "stats")
    assert statistics_report(tmp_path / "stats") == report
    nothing = statistics_report(statistics(DEAD, nope(1)))
    assert (nothing.resultant, nothing.drift, nothing.weakest(3)) == (0, None, [])


def test_the_halves_are_in_the_file_and_old_files_have_none(tmp_path: Path) -> None:
    half = replace(SECOND, layer=0)
    statistics_file.save(statistics(FIRST, nope(1), first_half=[half, nope(1)], first_tokens=100), tmp_path / "new")
    found = statistics_file.load(tmp_path / "new")
    assert found.first_tokens == 100 and found.first_half[0].layer == 0
    np.testing.assert_array_equal(found.first_half[0].q_mean, SECOND.q_mean)
    np.testing.assert_array_equal(found.first_half[0].q_abs, SECOND.q_abs)

    tensors = {name: value for name, value in load_file(tmp_path / "new").items() if "first" not in name}
    with safe_open(tmp_path / "new", framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "damaged", metadata)
    with pytest.raises(StatisticsError, match=r"damaged.*layers\.000\.first_q_mean"):
        statistics_file.load(tmp_path / "damaged")
    header = json.loads(metadata["statistics"])
    del header["first_tokens"]
    save_file(tensors, tmp_path / "old", metadata | {"statistics": json.dumps(header)})
    old = statistics_report(tmp_path / "old")
    assert (old.tokens_by_half, old.drift) == ([], None)
    assert old.resultant == statistics_report(statistics(FIRST, nope(1))).resultant


def test_a_model_without_centres_is_named_with_its_worst_layers() -> None:
    good = layer(3, [[0.9, 0.9], [0.9, 0.9]], [[1, 1], [1, 1]])
    report = statistics_report(statistics(FIRST, SECOND, DEAD, good, nope(4)))
    assert report.doubt.startswith("amplitude-weighted R is 0.39, below 0.5")
    assert "least in layers 1 (R 0.10), 0 (R 0.35), 3 (R 0.90);" in report.doubt
    assert "keysieve compare" in report.doubt
    assert not statistics_report(statistics(good, nope(1))).doubt
    assert not statistics_report(statistics(nope(0))).doubt
    assert "least in layers" not in statistics_report(statistics(DEAD)).doubt


def test_the_picture_has_a_cell_for_every_layer_and_band() -> None:
    wide = LayerStatistics(5, rope(6), np.ones((1, 6)), np.full((1, 3), 2.0))
    report = statistics_report(statistics(FIRST, nope(1), wide, first_half=[FIRST, nope(1), wide], first_tokens=100))
    picture = ElementTree.fromstring(report.to_svg())
    cells = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "cell"]
    assert len(cells) == 2 + 0 + 3
    assert {cell.findtext(f"{SVG}title") for cell in cells} >= {
        f"layer 0, band 0: R {6 / 14:.3f}",
        f"layer 5, band 2: R {2**0.5 / 2:.3f}",
    }
    assert len({cell.get("fill") for cell in cells}) == 3  # the colour is the value
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "Some<Model>: mean resultant length R of pre-RoPE queries" in texts
    assert any(text and "300 tokens" in text and "halves of 100 + 200" in text for text in texts)
    assert {"layer", "R", "drift", "5", "0.350", "-", "0.5"} <= set(texts)
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for cell in cells:
        assert float(cell.get("x", -1)) + float(cell.get("width", 0)) <= width
        assert float(cell.get("y", -1)) + float(cell.get("height", 0)) <= height


def test_the_picture_has_shares_of_every_layer_and_head() -> None:
    plan = Learned(1, 2, 1, 1, 64, 2048, [256, 512, 1024], done=4)
    gates = {"gate_weight": np.zeros((2, 3), np.float32), "gate_bias": np.zeros(2, np.float32)}
    shares = {"share": np.float32([[0.1, 1.9], [0.25, 4.0], [1.0, 1.0]]), "gate_fit": np.float32([0.6, 0.8])}
    learned = [replace(FIRST, **gates, **shares), nope(1)]
    svg = statistics_report(replace(statistics(*learned), learned=plan)).to_svg()
    picture = ElementTree.fromstring(svg)
    cells = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "share"]
    titles = [cell.findtext(f"{SVG}title") for cell in cells]
    assert titles == [f"layer 0, KV head {head}: share {share}" for head, share in enumerate(("0.25", "4.00"))]
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"gate r", "0.700", "of rows, at budget 512", "KV head", "1/8", "8"} <= set(texts)
    assert all(
        float(cell.get("x", 0)) + float(cell.get("width", 0)) <= float(picture.get("width", 0)) for cell in cells
    )
    plain = statistics_report(statistics(FIRST, SECOND)).to_svg()
    assert "gate r" not in plain and "KV head" not in plain


def test_reports_are_svg_or_json(tmp_path: Path) -> None:
    report = statistics_report(statistics(FIRST))
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_json()
    with pytest.raises(ConfigError, match=r"a report is \.svg or \.json, not '\.png'"):
        write_report(report, tmp_path / "report.png")
    with pytest.raises(StatisticsError, match="cannot write"):
        write_report(report, tmp_path / "absent" / "report.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
