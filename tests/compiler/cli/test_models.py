"""keysieve models: a table for people, JSON for programs, and no heavy imports for either."""

import json
import subprocess
import sys

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.models import models

KEYS = ["architecture", "status", "attention", "rope_form", "reason", "transformers"]


def test_json_has_the_keys_that_others_script_against(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    verdicts = [model for model in models() if model.outcome.status != "matched"]
    assert list(report) == ["models"] and len(report["models"]) == len(verdicts) > 30
    for entry in report["models"]:
        assert list(entry) == KEYS
        assert entry["status"] in ("pass", "refused", "fail")
        assert (entry["reason"] is None) == (entry["status"] == "pass")
        assert entry["transformers"] and all(version.startswith("5.") for version in entry["transformers"])
    passed = [entry for entry in report["models"] if entry["status"] == "pass"]
    llama = [entry for entry in passed if entry["architecture"] == "LlamaForCausalLM"]
    assert ("full", "half_split") in [(entry["attention"], entry["rope_form"]) for entry in llama]


def test_the_table_shows_every_entry_and_every_reason(capsys: pytest.CaptureFixture) -> None:
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "architecture status attention RoPE evicts transformers torch"
    for model in models():
        found = model.outcome
        evicts = f"{found.evicts} of {found.layers} layers" if found.status in ("pass", "matched") else "-"
        form = f"{found.attention or '-'} {found.rope_form or '-'} {evicts}"
        versions = f"{model.tested_with('transformers')} {model.tested_with('torch')}"
        assert f"{found.architecture} {found.status} {form} {versions}" in lines
        reason = " ".join((found.reason or "").split())
        assert not reason or f"{found.architecture} {found.status} {reason}" in lines
    assert "`keysieve inspect MODEL` says which layers match" in lines[-1]


@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_it_is_light(arguments: list[str]) -> None:
    script = (
        "import sys; from keysieve.compiler.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{code} {sorted(heavy)}' if code or heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout
