"""keysieve calibrate: how options reach the function, and what an interrupt says."""

import json
from pathlib import Path

import numpy as np
import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.statistics import LayerStatistics, Statistics
from keysieve.compiler.statistics_file import save
from keysieve.passes.rope_form import RopeForm

FUNCTION = "calibrate.calibrate"
RESULT = Statistics([], 2048, 2048, "")


def test_defaults(stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, RESULT)
    output = tmp_path / "stats.safetensors"
    assert main(["calibrate", "some/model", "-o", str(output)]) == 0
    ((args, kwargs),) = calls
    assert args == ("some/model", output)
    assert kwargs.pop("progress").quiet is False
    assert kwargs == {
        "texts": None,
        "max_tokens": 49152,
        "text_field": "text",
        "batch_size": 1,
        "layer_by_layer": None,
        "gates": True,
        "context": None,
    }
    printed = capsys.readouterr()
    assert f"{output}: 2,048 tokens" in printed.out
    assert f"next: keysieve compile some/model -o DIR --stats {output}" in printed.out
    assert printed.err == ""


def test_options(stub, tmp_path: Path) -> None:
    calls = stub(FUNCTION, RESULT)
    options = ["--text", "a", "b", "--text", "c", "--max-tokens", "100", "--quiet"]
    assert main(["calibrate", "m", "-o", str(tmp_path / "s"), *options]) == 0
    kwargs = calls[0][1]
    assert kwargs["texts"] == [Path("a"), Path("b"), Path("c")]
    assert (kwargs["max_tokens"], kwargs["progress"].quiet) == (100, True)


def test_a_missing_folder_is_refused_before_any_work(stub, tmp_path: Path) -> None:
    calls = stub(FUNCTION, RESULT)
    assert main(["calibrate", "m", "-o", str(tmp_path / "missing" / "s")]) == 2
    assert not calls


@pytest.mark.parametrize(
    ("name", "exists", "message"),
    [
        ("s.safetensors", True, "was kept in {output}, and the same command goes on from there"),
        ("s.safetensors", False, "nothing was measured yet"),
        ("s.pt", False, "nothing was kept"),
    ],
)
def test_an_interrupt_says_what_was_kept(
    name: str, exists: bool, message: str, stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stub(FUNCTION, KeyboardInterrupt())
    output = tmp_path / name
    if exists:
        output.touch()
    assert main(["calibrate", "m", "-o", str(output)]) == 130
    assert message.format(output=output) in capsys.readouterr().err


def test_where_texts_come_from_and_how_the_model_is_read(stub, tmp_path: Path) -> None:
    calls = stub(FUNCTION, RESULT)
    base = ["calibrate", "m", "-o", str(tmp_path / "s"), "--quiet"]
    assert main([*base, "--text", "a.jsonl", "--text-field", "body", "--batch-size", "4", "--layer-by-layer"]) == 0
    assert main([*base, "--no-layer-by-layer"]) == 0
    kwargs = calls[0][1]
    assert (kwargs["texts"], kwargs["text_field"], kwargs["batch_size"]) == ([Path("a.jsonl")], "body", 4)
    assert [call[1]["layer_by_layer"] for call in calls] == [True, False]
    assert main([*base, "--batch-size", "0"]) == 2


@pytest.mark.parametrize(("options", "gates"), [([], True), (["--gates"], True), (["--no-gates"], False)])
def test_gates_are_learned_unless_they_are_left_out(options: list[str], gates: bool, stub, tmp_path: Path) -> None:
    calls = stub(FUNCTION, RESULT)
    assert main(["calibrate", "m", "-o", str(tmp_path / "s"), "--quiet", *options]) == 0
    assert calls[0][1]["gates"] is gates


def test_a_context_for_shares_that_nobody_keeps(stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, RESULT)
    assert main(["calibrate", "m", "-o", str(tmp_path / "s.pt"), "--context", "64"]) == 2
    assert "no place for shares" in capsys.readouterr().err and not calls


def fitted() -> Statistics:
    rope = RopeForm("half_split", 4, 4, np.array([1.0, 0.1]))
    layers = [LayerStatistics(n, rope, np.full((1, 4), mean), np.ones((1, 2))) for n, mean in ((0, 0.6), (1, 0.5))]
    return Statistics(layers, 2048, 2048, "", {"architecture": "Some"}, 1024, layers, 1024)


def test_the_summary_and_the_report(stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, fitted())
    base = ["calibrate", "m", "-o", str(tmp_path / "s")]
    assert main([*base, "--report", str(tmp_path / "r.svg")]) == 0
    printed = capsys.readouterr()
    assert "amplitude-weighted R 0.778, drift 0.000 between the halves of the text" in printed.err
    assert "weakest layers 1 (0.707), 0 (0.849)" in printed.err
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    assert main([*base, "--report", str(tmp_path / "r.json"), "--quiet"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["tokens_by_half"] == [1024, 1024]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "message"), [("r.png", "a report is .svg or .json"), ("no/r.svg", "--report {}/no/r.svg: there is no")]
)
def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    name: str, message: str, stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    calls = stub(FUNCTION, fitted())
    assert main(["calibrate", "m", "-o", str(tmp_path / "s"), "--report", str(tmp_path / name)]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert not calls


def test_inspect_reads_a_statistics_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, picture = tmp_path / "stats.safetensors", tmp_path / "picture.svg"
    save(fitted(), file)
    assert main(["inspect", str(file), "--picture", str(picture)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Some: statistics of 2 layers"
    assert "drift 0.000 between halves of 1,024 and 1,024 tokens" in lines
    assert lines[-2:] == ["0 half_split 0.849 0.000 -", "1 half_split 0.707 0.000 -"]
    assert picture.read_text().startswith("<svg")
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resultant"] == pytest.approx(0.55 * 2**0.5)


def test_inspect_warns_of_a_model_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    poor = fitted()
    poor.layers[0].q_mean[:] = 0
    save(poor, tmp_path / "stats")
    assert main(["inspect", str(tmp_path / "stats")]) == 0
    assert "warning: amplitude-weighted R is 0.35, below 0.5" in capsys.readouterr().err


def test_inspect_refuses_what_is_no_statistics_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 1
    assert main(["inspect", str(tmp_path), "--picture", str(tmp_path / "p.svg")]) == 2
    save(fitted(), tmp_path / "stats")
    assert main(["inspect", str(tmp_path / "stats"), "--picture", str(tmp_path / "p.json")]) == 2
    printed = capsys.readouterr().err
    assert "a.safetensors is no readable safetensors file" in printed
    assert "--picture needs a statistics file" in printed and "a picture is .svg" in printed
