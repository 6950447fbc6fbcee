"""The check for GPUs, tried without one: its stages on a CPU with tiny sizes, what it brings along, and its page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import model, page
from gpu.driver import DRIVER, SCORE, SELECT, UPDATE, Plugin
from gpu.libraries import CASES
from gpu.pack import main as pack
from gpu.run import IN_TURN, TOGETHER, main

REPOSITORY = Path(__file__).parents[2]
TRIED = ("tokens", "environment", "attention", "rounds", "decoding", "prompts", "huggingface")


@pytest.mark.slow
def test_every_stage_of_python_runs_in_tritons_interpreter(tmp_path: Path) -> None:
    model.prepare(tmp_path / "built" / "tiny", tiny=True)
    output = tmp_path / "results"
    place = ["--device", "cpu", "--built", str(tmp_path / "built"), "-o", str(output)]
    main([*place, "--only", ",".join(TRIED)])
    content = json.loads((output / "gpu.json").read_text())
    assert {name: end["code"] for name, end in content["stages"].items()} == dict.fromkeys(TRIED, 0)
    assert [result for result in content["results"] if "failed" in result] == []
    found = {result["stage"]: result for result in content["results"]}
    assert found["tokens"]["same"] == found["tokens"]["of"] == 12 and max(found["tokens"]["rounds"]) >= 1
    assert found["attention"]["error"] < 1e-6
    assert {"round", "decoding", "largest batch", "prompt", "huggingface", "environment"} <= set(found)
    assert "tokens of the GPU that are the CPU's | 12 of 12" in page.text(content)


def test_a_stage_that_fails_is_a_result(tmp_path: Path) -> None:
    """Nothing was built here, so the model is not there; what comes after it still runs."""
    main(
        ["--device", "cpu", "--built", str(tmp_path / "nothing"), "-o", str(tmp_path), "--only", "environment,prompts"]
    )
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["stages"]["environment"]["code"] == 0 and content["results"][0]["stage"] == "environment"
    assert content["stages"]["prompts"]["code"] != 0 and "nothing" in content["stages"]["prompts"]["log"][-1]


def test_a_run_replaces_the_results_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["--device", "cpu", "-o", "here", "--only", "environment"])
    assert len(json.loads((tmp_path / "here" / "gpu.json").read_text())["results"]) == 1


def test_a_stage_that_nobody_knows() -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--only", "environment,nonsense"])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu" / "run.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "no NVIDIA GPU that torch can use" in found.stderr


def test_all_stages_together_have_a_limit(tmp_path: Path) -> None:
    main(["--device", "cpu", "--limit", "0", "-o", str(tmp_path), "--only", "environment,decoding compiled"])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [end["log"] for end in stages.values()] == [["no time was left"]] * 2
    left = subprocess.run(["pgrep", "-f", f"--stage decoding.*{tmp_path}"], capture_output=True, check=False)
    assert not left.stdout, "a stage that was prepared runs on"
    assert len({stage.name for stage in (*TOGETHER, *IN_TURN)}) == len(TOGETHER) + len(IN_TURN)


@pytest.mark.slow
def test_the_driver_talks_to_the_plugin_library(tmp_path: Path) -> None:
    """createPlugin of all three; enqueue gets as far as the GPU's driver, which is not there."""
    pack(tmp_path, ("small",), tiny=True)
    assert {file.name for file in tmp_path.iterdir()} >= {"small-cubin.so", "small-ptx.so", DRIVER, "tiny"}
    kernels, library = CASES["small"].kernels, tmp_path / "small-ptx.so"
    update = Plugin(tmp_path / DRIVER, library, UPDATE, layer=1)
    score = {"policy": "trig", "query_heads": kernels.query_heads, "rotary_dim": kernels.rotary_dim, "interleaved": 0}
    Plugin(tmp_path / DRIVER, library, SCORE, **score)
    chosen = {"scope": kernels.scope, "kv_heads": kernels.kv_heads, "sinks": kernels.sinks, "recent": kernels.recent}
    Plugin(tmp_path / DRIVER, library, SELECT, **chosen)
    with pytest.raises(RuntimeError, match="makes no plugin of row=i:1"):
        Plugin(tmp_path / DRIVER, library, UPDATE, row=1)
    if not torch.cuda.is_available():
        rows = torch.zeros(1, kernels.kv_heads, 320, 64, dtype=torch.float16)
        new = torch.zeros(1, kernels.kv_heads, 1, 64, dtype=torch.float16)
        ints = torch.zeros(1, dtype=torch.int32)
        plan = torch.zeros(kernels.layers, 1, kernels.kv_heads, 320, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="libcuda"):
            update.enqueue([new, new, ints, plan, ints, rows, rows], [rows, rows], stream=0)


def test_the_committed_page_is_made_of_the_committed_results() -> None:
    assert page.PAGE.read_text() == page.text(json.loads(page.RESULTS.read_text()))


def test_what_nobody_measured_is_said() -> None:
    text = page.text({"commit": None, "seconds": 1, "stages": {}, "results": []})
    assert text.count(page.NOTHING) >= 5
