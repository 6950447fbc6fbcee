"""keysieve compare: the table, and the report file that others script against."""

import json
from pathlib import Path

import pytest

from keysieve.compiler.cli import main

FUNCTION = "compare.compare"
ROW = {
    "policy": "triattention",
    "heads": "uniform",
    "budget": 256,
    "scope": "per_head",
    "tokens": 2047,
    "kl": 0.0123,
    "kl_p95": 0.25,
    "kl_se": None,
    "top1": 0.9,
    "ppl": 12.3456,
    "ppl_dense": 12.0,
}
REPORT = {"rows": [ROW, ROW | {"budget": 1024}]}


def test_defaults(stub, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, REPORT)
    assert main(["compare", "b", "--text", "t"]) == 0
    ((args, kwargs),) = calls
    assert args == (Path("b"), [Path("t")], [256, 512, 1024])
    assert kwargs.pop("progress").quiet is False
    assert kwargs == {}
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:5] == ["policy", "heads", "scope", "budget", "tokens"]
    numbers = ["256", "2,047", "0.0123", "0.2500", "90.0%", "12.346", "12.000"]
    assert rows[0] == ["triattention", "uniform", "per_head", *numbers]
    assert len(rows) == 2


def test_options_and_report_file(stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, REPORT)
    output = tmp_path / "report.json"
    options = ["--budgets", "256,1024", "--threads", "2", "--max-tokens", "600", "--quiet", "--json"]
    assert main(["compare", "b", "--text", "t", "u", "-o", str(output), *options]) == 0
    args, kwargs = calls[0]
    assert args == (Path("b"), [Path("t"), Path("u")], [256, 1024])
    assert (kwargs["threads"], kwargs["max_tokens"], kwargs["progress"].quiet) == (2, 600, True)
    assert json.loads(output.read_text(encoding="utf-8")) == REPORT
    assert json.loads(capsys.readouterr().out) == REPORT
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_that_cannot_be_written_does_not_cost_the_result(
    stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stub(FUNCTION, REPORT)
    stub("bundle.write_atomically", OSError(28, "No space left on device"))
    assert main(["compare", "b", "--text", "t", "-o", str(tmp_path / "r.json")]) == 1
    output = capsys.readouterr()
    assert "triattention" in output.out
    assert "No space left on device; choose another -o" in output.err


@pytest.mark.parametrize("options", [["--budgets", "256,x"], ["--budgets", ""], ["-o", "missing/r.json"]])
def test_options_that_cannot_work_are_2(options: list[str], stub) -> None:
    calls = stub(FUNCTION, REPORT)
    assert main(["compare", "b", "--text", "t", *options]) == 2
    assert not calls
