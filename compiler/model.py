"""Loading what a user calls MODEL: a hub name, a local folder, or a GGUF file."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from keysieve.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _location(model: str | Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a hub name, a folder or a GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CaptureError(f"no such GGUF file: {path}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise CaptureError(f"folder {path} has no config.json, so it is not a HuggingFace model")
    return {"pretrained_model_name_or_path": str(model)}


@contextmanager
def _readable_failures(model: str | Path, what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad MODEL into one CaptureError."""
    try:
        yield
    except Exception as error:  # the libraries below raise kinds of their own, with no common base
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"cannot load the {what} of {model}: {first} "
            "(MODEL is a hub name, which needs network or cache, a folder with config.json, or a .gguf file)"
        ) from error


def load_model(model: str | Path, dtype: str = "float32") -> "PreTrainedModel":
    """The model with its weights in `dtype` ("auto": as they are stored), on the CPU, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with _readable_failures(model, "weights"):
        loaded = AutoModelForCausalLM.from_pretrained(**_location(model), dtype=TORCH_DTYPES.get(dtype, dtype))
    return loaded.eval()


def round_weights(model: "PreTrainedModel", dtype: str) -> None:
    """Bring the parameters to `dtype`; buffers, such as RoPE tables, keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(TORCH_DTYPES[dtype])


def load_skeleton(model: str | Path, dtype: str = "float32") -> "PreTrainedModel":
    """The model without its weights: every parameter is one stored element, expanded, so a 70B model takes no memory.

    Buffers (RoPE tables) are real, which is what the passes need.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable_failures(model, "configuration"):
        config = AutoConfig.from_pretrained(**_location(model))
    with _readable_failures(model, "architecture"), _meta_parameters():
        skeleton = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype])
    _expand_parameters(skeleton)
    return skeleton.eval()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """New parameters go to the meta device (buffers stay real), so that initialisation costs nothing."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _expand_parameters(model: nn.Module) -> None:
    """Replace meta parameters by CPU ones of the same shape that store a single element (tied ones stay tied)."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in replaced:
                one = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
                replaced[parameter] = nn.Parameter(one, requires_grad=False)
            module._parameters[name] = replaced[parameter]


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer. Raises CaptureError where there is none."""
    from transformers import AutoTokenizer

    with _readable_failures(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(**_location(model))


def identity(
    model: "PreTrainedModel", parameters: Iterable[tuple[str, torch.Tensor]] | None = None
) -> dict[str, str | int]:
    """What ties a statistics file or a bundle to a model: sizes and two hashes.

    config_sha256 covers the configuration without names and versions; weights_sha256 covers every parameter's name,
    shape and 64 evenly spaced elements. parameters: those of a model that is loaded without them, sorted by name.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in _VOLATILE_FIELDS}
    weights = sha256()
    for name, parameter in parameters or sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float()
        weights.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return {
        "architecture": (model.config.architectures or [type(model).__name__])[0],
        "config_sha256": sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


_VOLATILE_FIELDS = {"transformers_version", "dtype", "torch_dtype", "architectures", "quantization_config", "use_cache"}
