"""Weights from safetensors files one at a time: the same as loading the model, and a reason where that cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from keysieve.compiler import weights as module
from keysieve.compiler.model import identity, load_model, load_skeleton
from keysieve.compiler.weights import Checkpoint, free_memory, safetensors_files, too_large, weights_bytes
from keysieve.errors import CaptureError
from support.families import family_model
from support.tiny_models import tiny_model

Change = Callable[[dict[str, torch.Tensor]], object]


def saved(model: PreTrainedModel, folder: Path, shard: str = "100KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def changed(folder: Path, change: Change) -> Path:
    """The same model with other entries in its only file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A model in one file."""
    return saved(tiny_model("llama_mha"), tmp_path / "model", "1GB")


# cohere ties its embeddings, mixtral's experts lie one by one in its file, and glm4_moe has a buffer that is stored
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("cohere", torch.float32),
        ("cohere", torch.bfloat16),
        ("mixtral", torch.float32),
        ("glm4_moe", torch.bfloat16),
    ],
)
def test_tensors_are_those_of_the_loaded_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = (tiny_model(name) if name == "cohere" else family_model(name)).to(dtype)
    folder = saved(model, tmp_path / name)
    assert len(safetensors_files(folder) or []) > 2
    skeleton, loaded = load_skeleton(folder), load_model(folder)
    checkpoint = Checkpoint(folder, skeleton)
    for tensor_name, wanted in loaded.state_dict().items():
        found = checkpoint.read(tensor_name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert identity(skeleton, checkpoint.parameters()) == identity(loaded)
    assert identity(skeleton) != identity(loaded)


def test_a_file_of_the_base_model_has_shorter_names(whole: Path) -> None:
    wanted = load_model(whole).state_dict()

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    checkpoint = Checkpoint(changed(whole, shorten), load_skeleton(whole))
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(checkpoint.read(name), wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            r"parameter model\.layers\.1\.mlp\.up_proj\.weight is not in its safetensors files; .*--no-layer-by-layer",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name],
            r"parameter model\.layers\.0\.mlp\.\w+\.weight is not in its .*\(nor are 5 others\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight is \[3\] in .*model\.safetensors and \[64\] in the model",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"model\.norm\.weight is of type I8, which is no plain float",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Change, message: str, whole: Path) -> None:
    changed(whole, change)
    skeleton = load_skeleton(whole)
    with pytest.raises(CaptureError, match=message):
        list(Checkpoint(whole, skeleton).parameters())


def test_a_quantized_model_is_refused(whole: Path) -> None:
    skeleton = load_skeleton(whole)
    skeleton.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(CaptureError, match="is quantized"):
        Checkpoint(whole, skeleton)


def test_a_model_without_safetensors_is_refused(whole: Path, tmp_path: Path) -> None:
    skeleton = load_skeleton(whole)
    (whole / "model.safetensors").unlink()
    assert safetensors_files(whole) is None and too_large(whole, 1) is None
    with pytest.raises(CaptureError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        Checkpoint(whole, skeleton)
    assert safetensors_files(tmp_path / "model.gguf") is None


def test_a_damaged_file_is_named(whole: Path) -> None:
    skeleton = load_skeleton(whole)
    (whole / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CaptureError, match=r"cannot read the weights file .*model\.safetensors"):
        Checkpoint(whole, skeleton)


def test_a_model_is_too_large_for_little_memory(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = safetensors_files(whole) or []
    size = sum(parameter.numel() * 4 for parameter in tiny_model("llama_mha").parameters())
    assert weights_bytes(files) == size
    assert 2**20 < free_memory() < 2**50
    monkeypatch.setattr(module, "free_memory", lambda: 2 * size)
    assert too_large(whole, 1) is None
    assert (too_large(whole, 2) or "").startswith("it would take 0.0 GB of memory in each of 2 processes, and")
    monkeypatch.setattr(module, "free_memory", lambda: size)
    assert too_large(whole, 1)


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    monkeypatch.setattr(module, "_CONTAINERS", ((tmp_path, "memory.max", "memory.current", "inactive_file"),))
    assert free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 2**20
