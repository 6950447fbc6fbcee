"""keysieve compile: which config the options make, what is refused before any work, and the summary."""

from pathlib import Path

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig, TensorRTConfig

FUNCTION = "compile.compile"
LAYERS = [("half_split", None)] * 2
NODES = {"KeySieveUpdate": 2, "KeySieveScore": 1, "KeySieveSelect": 1}


def test_defaults_are_those_of_the_config_objects(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", "-o", "out", "--stats", "s"]) == 0
    ((args, kwargs),) = calls
    assert args == ("m", Path("out"), CompileConfig(stats=Path("s")))
    assert kwargs.pop("progress").quiet is False
    assert kwargs == {"dry_run": False}


def test_every_option_reaches_the_config(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    options = (
        "--policy triattention --stats s --budget 300 --interval 64 --sinks 0 --recent 16 --centres online "
        "--scope union --prompt pinned --dtype float16 --dump-graphs graphs --inline --offset-max 1024 "
        "--aggregation max --no-trig --quiet"
    )
    assert main(["compile", "m", "-o", "out", *options.split()]) == 0
    policy = PolicyConfig("triattention", "online", "max", 1024, trig=False)
    eviction = EvictionConfig(policy, 300, 64, 0, 16, "union", "pinned")
    (_, _, config), kwargs = calls[0]
    assert config == CompileConfig(eviction, "float16", Path("s"), inline=True, dump_graphs=Path("graphs"))
    assert kwargs["progress"].quiet is True


def test_integer_weights_and_caches_of_another_type(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", "-o", "out", "--stats", "s", "--weights", "int4", "--kv-dtype", "float16"]) == 0
    assert calls[0][0][2] == CompileConfig(stats=Path("s"), weights="int4", kv_dtype="float16")


def test_terms(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", "-o", "out", "--stats", "s", "--terms", "gate,trig"]) == 0
    assert calls[0][0][2].eviction.policy == PolicyConfig("sieve", terms=("trig", "gate"))
    assert PolicyConfig(terms=["gate", "trig", "gate"]).terms == ("trig", "gate")


def test_no_norm(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", "-o", "out", "--centres", "online", "--no-norm"]) == 0
    policy = calls[0][0][2].eviction.policy
    assert (policy.trig, policy.norm) == (True, False)


def test_tensorrt_options_reach_the_config(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    options = (
        "--policy streaming --target tensorrt-rtx --arch 86,120 --max-batch 2 --max-chunk 64 --max-capacity 4096 "
        "--aliased --tensorrt-include headers"
    )
    assert main(["compile", "m", "-o", "out", *options.split()]) == 0
    config = calls[0][0][2]
    assert config.target == "tensorrt-rtx"
    assert config.tensorrt == TensorRTConfig((86, 120), 2, 4096, 64, True, Path("headers"))


def test_a_number_of_classes_asks_for_classes(stub, report) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", "-o", "out", "--stats", "s", "--head-classes", "2"]) == 0
    eviction = calls[0][0][2].eviction
    assert (eviction.heads, eviction.head_classes) == ("classes", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--policy streaming", "give -o DIR"),
        (
            "-o out --policy streaming --arch 86",
            "--arch is for TensorRT targets; add --target tensorrt-rtx or tensorrt",
        ),
        ("-o out --policy streaming --target tensorrt --inline", "leave --inline out"),
        ("-o out --policy triattention", "needs a statistics file"),
        ("-o out --terms gate", "needs the gates of a statistics file"),
        ("-o out --budget 99999999999", "budget 99,999,999,999 is beyond 16,777,216 rows"),
        ("-o out --stats s --head-classes 2 --target tensorrt-rtx", "tensorrt-rtx takes one budget for all heads"),
        ("-o out --heads uniform --head-classes 2", "add that, or leave it out"),
        ("-o out --terms trig,nope", "unknown term 'nope'"),
        ("-o out --policy streaming --terms trig", "policy streaming has no --terms"),
        ("-o out --policy nope", "invalid choice: 'nope'"),
        ("-o out --policy streaming --budget 132", "budget 132 leaves no row to choose"),
        ("-o out --policy streaming --budget 0", "'0' is not a whole number"),
        ("-o out --policy streaming --stats s", "uses no statistics"),
        ("-o out --policy random --centres online --no-trig", "policy random does not use --centres, --no-trig"),
        ("-o out --centres online --offset-max 1000", "power of two"),
        ("-o out --centres online --no-trig --no-norm", "nothing is left to score"),
    ],
)
def test_options_that_cannot_work_are_2(
    options: str, message: str, stub, report, capsys: pytest.CaptureFixture
) -> None:
    calls = stub(FUNCTION, report(*LAYERS))
    assert main(["compile", "m", *options.split()]) == 2
    output = capsys.readouterr()
    assert (output.out, calls) == ("", [])
    assert message in output.err


def test_summary(stub, report, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, report(*LAYERS, nodes=NODES))
    output = tmp_path / "my bundle"
    output.mkdir()
    (output / "model.onnx").write_bytes(bytes(1500))
    assert main(["compile", "m", "-o", str(output), "--centres", "online"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{output} (1.5 kB)" in printed.out
    assert "2 of 2 matched" in printed.out
    assert "2 KeySieveUpdate, 1 KeySieveScore, 1 KeySieveSelect" in printed.out
    assert f"next: keysieve run '{output}' --prompt" in printed.out


def test_a_dry_run_needs_no_output(stub, report, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, report(*LAYERS, nodes=NODES))
    assert main(["compile", "m", "--policy", "streaming", "--dry-run"]) == 0
    assert calls[0][1]["dry_run"] is True
    assert "a dry run writes nothing" in capsys.readouterr().out
