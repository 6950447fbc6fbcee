"""A plan's runtime on a stand-in for TensorRT: what is bound where, and what is refused; test_gpu.py runs a plan."""

import sys
from pathlib import Path
from typing import Any

import pytest

from keysieve.compiler.bundle import Bundle, open_bundle
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.runtimes import tensorrt as module
from keysieve.compiler.runtimes.tensorrt import PlanRuntime
from keysieve.errors import EngineError
from support.bundles import tiny_bundle
from support.plan_stand_in import TensorRT, with_plan

pytestmark = pytest.mark.usefixtures("one_thread")

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
LIMITS = {"batch": 2, "capacity": 96, "chunk": 32}
PROMPTS = [list(range(5, 75)), list(range(9, 20))]


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Bundle:
    compiled = open_bundle(tiny_bundle("llama", EVICTION, root))
    entry = with_plan(compiled.path, tmp_path, LIMITS)
    for file in (*compiled.path.glob("*.json"), compiled.path / "state.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    return Bundle(tmp_path, {**compiled.manifest, "target": "tensorrt", "tensorrt": entry})


def runtime(bundle: Bundle, *refused: str) -> tuple[PlanRuntime, TensorRT]:
    trt = TensorRT(*refused)
    return PlanRuntime(bundle, "cpu", trt), trt


def test_tokens_and_counters_are_those_of_onnx_runtime(bundle: Bundle, root: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "stop_tokens": []}
    plan, trt = runtime(bundle)
    ours, theirs = Engine(bundle, plan), load(tiny_bundle("llama", EVICTION, root))
    found, wanted = ours.generate(PROMPTS, **options), theirs.generate(PROMPTS, **options)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert ours.counters == theirs.counters
    assert max(ours.counters.rounds) >= 3
    decoded = 59
    assert (trt.calls["runs", 0], trt.calls["runs", 1]) == (decoded, 5)  # 70 tokens in chunks of 16
    # What is fed keeps its address and state alternates between two: while decoding, nothing else is set again.
    layers, state = 3, ("length", "plan", "keep", "centre", "magnitude")
    fed, results = 7, 2
    first = 4 * layers + fed + results + 2 * len(state)
    assert trt.calls["addresses", 0] == first + 2 * len(state) * (decoded - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 90}, "capacity 106 is beyond the 96 that the plan was built for.*--max-capacity"),
        ({"chunk": 33}, "chunk 33 is beyond the 32"),
        ({"dense": True, "max_new_tokens": 50}, "capacity 120 is beyond"),
    ],
)
def test_what_is_beyond_the_profiles(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    plan, trt = runtime(bundle)
    with pytest.raises(EngineError, match=message):
        Engine(bundle, plan).generate(PROMPTS, **{"max_new_tokens": 50, **options})
    with pytest.raises(EngineError, match="batch 3 is beyond the 2"):
        Engine(bundle, plan).session(3)
    assert not trt.calls


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("profile", "has no profile 0 in the plan"),
        ("plan", r"TensorRT 0\.0 cannot load .*model\.plan"),
        ("key_1", r"the plan does not take key_1 of shape \[2, 2, 64, 16\]"),
        ("address of logits", "the plan has no tensor logits"),
        ("run", "TensorRT could not run the plan"),
    ],
)
def test_refusals_of_tensorrt_are_errors(bundle: Bundle, refused: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Engine(bundle, runtime(bundle, refused)[0]).generate(PROMPTS, max_new_tokens=2)


def test_a_bundle_without_a_plan(root: Path) -> None:
    with pytest.raises(EngineError, match="holds no TensorRT plan; compile with --target torch or tensorrt-rtx"):
        load(tiny_bundle("llama", EVICTION, root), device="cuda")


def test_a_plan_for_another_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.manifest["tensorrt"]["plans"][0]["architecture"] = 89
    monkeypatch.setattr(module, "_architecture", lambda device: 86)
    with pytest.raises(EngineError, match="holds plans for sm_89, this GPU is sm_86; compile with --arch 86"):
        runtime(bundle)


def test_no_gpu_and_no_tensorrt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no NVIDIA GPU that torch can use"):
        PlanRuntime(bundle, "cuda", TensorRT())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="running the plan needs the module tensorrt"):
        PlanRuntime(bundle, "cuda")


def test_an_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="unknown device 'tpu'; choose one of cpu, cuda"):
        load(tmp_path, device="tpu")
