"""A program as text: read as it was written, and refused where this torch lacks an operation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keysieve.compiler.bundle import PROGRAM, WEIGHTS
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.runtimes.torch.program import read_program
from keysieve.errors import BundleError
from support.bundles import tiny_bundle

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return tiny_bundle("llama", EVICTION, root, target="torch")


def test_inputs_have_names_sizes_and_dtypes(bundle: Path) -> None:
    program = read_program(bundle / PROGRAM, load_file(bundle / WEIGHTS), CPU)
    inputs = {one.name: one for one in program.inputs}
    assert inputs["input_ids"].shape == ("batch", "tokens") and inputs["position"].dtype == torch.int64
    assert inputs["key_0"].sized({"batch": 2, "capacity": 9}) == (2, 2, 9, 16)
    assert inputs["keep"].dtype == torch.int32 and inputs["centre"].dtype == torch.float32
    assert program.tables == {"addresses": ["key_0", "key_1", "key_2"]} and program.heads == 12
    placeholders = [node.name for node in program.module.graph.nodes if node.op == "placeholder"]
    assert placeholders == list(inputs)


def test_every_tensor_is_made_on_the_device(bundle: Path) -> None:
    """On the meta device nothing is computed, and a tensor of another device makes an operation fail."""
    meta = torch.device("meta")
    weights = {name: tensor.to(meta) for name, tensor in load_file(bundle / WEIGHTS).items()}
    program = read_program(bundle / PROGRAM, weights, meta)
    sizes = {"batch": 2, "tokens": 1, "N": 1, "capacity": 80}
    logits, evicted = program.module(
        *(torch.empty(one.sized(sizes), dtype=one.dtype, device=meta) for one in program.inputs)
    )
    assert (logits.shape[:2], logits.device, evicted.device) == ((2, 1), meta, meta)


def test_weights_that_are_one_tensor_stand_once(root: Path) -> None:
    bundle = tiny_bundle("cohere", EVICTION, root, target="torch")  # its embedding gives the logits too
    stored = load_file(bundle / WEIGHTS)
    shapes = [tuple(tensor.shape) for tensor in stored.values()]
    vocabulary = json.loads((bundle / "manifest.json").read_text())["vocab_size"]
    assert sum(shape[0] == vocabulary for shape in shapes if shape) == 1
    assert read_program(bundle / PROGRAM, stored, CPU).module


@pytest.mark.parametrize("operation", ["nothing::at_all", "aten::no_such_thing.out", "operator.no_such", "os.remove"])
def test_an_operation_that_torch_lacks(bundle: Path, tmp_path: Path, operation: str) -> None:
    content = json.loads((bundle / PROGRAM).read_text())
    content["calls"][0][1] = operation
    file = tmp_path / PROGRAM
    file.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"needs the operation {operation}"):
        read_program(file, load_file(bundle / WEIGHTS), CPU)
