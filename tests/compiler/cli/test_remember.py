"""keysieve remember: the table, and the report file that others script against."""

import json
from pathlib import Path

import pytest

from keysieve.compiler.cli import main

FUNCTION = "memory.remember"
ROW = {
    "task": "facts",
    "tokens": 1024,
    "budget": 256,
    "policy": "sieve heads classes",
    "trials": 20,
    "dense": 13,
    "kept": 11,
}
REPORT = {"rows": [ROW, ROW | {"budget": 512, "kept": 13}]}


def test_defaults(stub, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, REPORT)
    assert main(["remember", "b"]) == 0
    ((args, kwargs),) = calls
    assert args == (Path("b"),)
    assert kwargs.pop("progress").quiet is False
    assert kwargs == {}
    assert capsys.readouterr().out.splitlines() == [
        "task   tokens  budget  policy                  dense      kept",
        "facts   1,024     256  sieve heads classes  13 of 20  11 of 13",
        "facts   1,024     512  sieve heads classes  13 of 20  13 of 13",
    ]


def test_options_and_report_file(stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, REPORT)
    output = tmp_path / "report.json"
    options = ["--tasks", "chat,facts,chat", "--budgets", "256,512", "--tokens", "2048", "--trials", "8", "--seed", "0"]
    assert main(["remember", "b", *options, "-o", str(output), "--threads", "2", "--quiet", "--json"]) == 0
    args, kwargs = calls[0]
    assert args == (Path("b"),)
    assert kwargs.pop("progress").quiet is True
    assert kwargs == {
        "tasks": ["chat", "facts"],
        "budgets": [256, 512],
        "tokens": 2048,
        "trials": 8,
        "seed": 0,
        "threads": 2,
    }
    assert json.loads(output.read_text(encoding="utf-8")) == REPORT
    assert json.loads(capsys.readouterr().out) == REPORT
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_that_cannot_be_written_does_not_cost_the_result(
    stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stub(FUNCTION, REPORT)
    stub("bundle.write_atomically", OSError(28, "No space left on device"))
    assert main(["remember", "b", "-o", str(tmp_path / "r.json")]) == 1
    output = capsys.readouterr()
    assert "11 of 13" in output.out
    assert "No space left on device; choose another -o" in output.err


@pytest.mark.parametrize(
    "options",
    [["--budgets", "256,x"], ["--trials", "0"], ["--seed", "-1"], ["--tasks", "facts,sums"], ["-o", "missing/r.json"]],
)
def test_options_that_cannot_work_are_2(options: list[str], stub) -> None:
    calls = stub(FUNCTION, REPORT)
    assert main(["remember", "b", *options]) == 2
    assert not calls
