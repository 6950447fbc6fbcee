"""keysieve doctor: a table for people, JSON for programs."""

import json

import pytest

from keysieve.compiler.cli import main


def test_table_and_json_tell_the_same(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, version in report["packages"].items():
        assert f"{name} " in text
        assert (version or "not installed") in text
    for entry in report["targets"]:
        assert any(line.startswith(entry["target"]) and entry["reason"] in line for line in text.splitlines())
