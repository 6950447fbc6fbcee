"""keysieve calibrate: how options reach the function, and what an interrupt says."""

from pathlib import Path

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.statistics import Statistics

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
        "max_tokens": 65536,
        "text_field": "text",
        "batch_size": 1,
        "layer_by_layer": None,
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
