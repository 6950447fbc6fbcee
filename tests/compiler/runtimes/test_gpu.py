"""What only a GPU can show: a plan that is loaded and run, the tokens it makes, and a decode step as a CUDA graph."""

from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig, TensorRTConfig
from keysieve.compiler.engine import load
from keysieve.compiler.progress import Progress
from keysieve.compiler.session import Session
from support.bundles import tiny_folder

pytestmark = pytest.mark.gpu

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
PROMPTS = [list(range(5, 75)), list(range(9, 20))]
ONE, INDEX = np.ones(1, np.int32), np.zeros((1, 1), np.int64)


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    """A tiny model with a TensorRT-RTX plan for this GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    major, minor = torch.cuda.get_device_capability()
    options = TensorRTConfig((10 * major + minor,), chunk=32)
    config = CompileConfig(EVICTION, "float16", target="tensorrt-rtx", tensorrt=options)
    compile(tiny_folder("llama", root), root / "gpu", config, Progress(quiet=True))
    return root / "gpu"


def test_the_plan_makes_onnx_runtimes_tokens(bundle: Path) -> None:
    gpu, cpu = load(bundle, device="cuda"), load(bundle)
    found, wanted = (e.generate(PROMPTS, max_new_tokens=100, stop_tokens=[]) for e in (gpu, cpu))
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert gpu.counters == cpu.counters
    assert min(gpu.counters.rounds) >= 3


def filled(bundle: Path, rows: int = 40) -> Session:
    session = load(bundle, device="cuda").session()
    for first in range(0, rows, 8):
        session.step(np.arange(5 + first, 13 + first)[None], np.array([8], np.int32), INDEX)
    return session


def test_a_decode_step_is_captured_as_a_cuda_graph(bundle: Path) -> None:
    """The captured step gives the logits that the step itself gave."""
    wanted = filled(bundle).step(np.array([[7]]), ONE, INDEX)
    session = filled(bundle)
    binding = session._binding
    session.step(np.array([[7]]), ONE, INDEX)  # sets shapes and addresses, as a captured step must not
    context, stream = binding.context(), binding._stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        assert context.execute_async_v3(stream.cuda_stream)
    session._logits[1].tensor.zero_()
    graph.replay()  # reads the state that the step read, and writes what it wrote
    torch.cuda.synchronize()
    np.testing.assert_allclose(session._logits[1].array, wanted, atol=1e-3)
