"""The official TriAttention file of query statistics, which TensorRT-LLM and the vLLM plugin read.

Source: TriAttention, arXiv 2604.04921, and the code that belongs to it.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler.statistics import RECALIBRATE, Identity, LayerStatistics, Statistics, check_equal
from keysieve.compiler.whole_file import existing, write_whole
from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

OFFICIAL_STYLES = {"half_split": "half", "interleaved": "interleaved"}
SUFFIXES = (".pt", ".pth")  # of the official format


def save_official(statistics: Statistics, path: str | Path) -> None:
    """Write the official TriAttention file (torch.save, float32) that TensorRT-LLM and the vLLM plugin read.

    It holds the rotary bands only: the mean of un-rotated dims, the token count and the identity are lost.
    Raises StatisticsError for a model one such file cannot describe: layers without RoPE, or mixed forms.
    """
    import torch

    forms = {(entry.rope.kind, entry.rope.head_dim) for entry in statistics.layers}
    if len(forms) != 1 or next(iter(forms))[0] not in OFFICIAL_STYLES:
        found = ", ".join(f"{kind} of head_dim {head_dim}" for kind, head_dim in sorted(forms)) or "no layer"
        raise StatisticsError(
            f"the official format holds one half-split or interleaved rope for all layers, but the model has "
            f"{found}; keep the safetensors statistics"
        )
    kind, head_dim = next(iter(forms))
    stats, sampled_heads = {}, []
    for entry in statistics.layers:
        real, imaginary = entry.rope.pairs
        for head, (mean, magnitude) in enumerate(zip(entry.q_mean, entry.q_abs, strict=True)):
            sampled_heads.append([entry.layer, head])
            stats[_official_name(entry.layer, head)] = {
                "q_mean_real": torch.tensor(mean[real], dtype=torch.float32),
                "q_mean_imag": torch.tensor(mean[imaginary], dtype=torch.float32),
                "q_abs_mean": torch.tensor(magnitude, dtype=torch.float32),
            }
    metadata = {"head_dim": head_dim, "rope_style": OFFICIAL_STYLES[kind], "sampled_heads": sampled_heads}
    write_whole(path, lambda temporary: torch.save({"metadata": metadata, "stats": stats}, temporary))


def load_official(
    path: str | Path,
    model_identity: Identity,
    ropes: list[RopeForm],
    query_heads: list[int],
    layers: Sequence[int] | None = None,
) -> Statistics:
    """Read an official TriAttention file for a model with these ropes and query heads, one entry per layer.

    Entry n of `ropes` is layer layers[n] of the file, or layer n; others are left out. The file holds rotary bands
    only, so the mean of un-rotated dims reads as 0; it names no model, so that only shapes can be checked and the
    identity is the caller's; its token count is unknown and reads as 0. Files of the official calibrator leave out
    q_norm and include the attention scaling: prefer own statistics for models that have either.
    Raises StatisticsError if a layer or head is missing, a shape is wrong, or head_dim or rope_style differ.
    """
    import torch

    path = existing(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise StatisticsError(f"{path} is no readable TriAttention file ({error}); {RECALIBRATE}") from error
    try:
        metadata, stats = content["metadata"], content["stats"]
        if layers is None and _has_layer(stats, len(ropes)):
            raise StatisticsError(f"holds more than the model's {len(ropes)} attention layers; {RECALIBRATE}")
        entries = []
        for layer, rope, heads in zip(layers or range(len(ropes)), ropes, query_heads, strict=True):
            _check_official_form(layer, rope, metadata)
            entries.append(_read_official_layer(layer, rope, heads, stats))
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path} is no TriAttention file ({error!r}); {RECALIBRATE}") from error
    return Statistics(entries, tokens=0, tokens_planned=0, text_sha256="", model=dict(model_identity))


def _official_name(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _has_layer(stats: Mapping[str, Any], layer: int) -> bool:
    return any(name.startswith(f"layer{layer:02d}_") for name in stats)


def _check_official_form(layer: int, rope: RopeForm, metadata: Mapping[str, Any]) -> None:
    style = OFFICIAL_STYLES.get(rope.kind)
    if style is None:
        raise StatisticsError(f"layer {layer} has no RoPE, which the official format cannot hold; {RECALIBRATE}")
    check_equal(f"layer {layer}: rope_style", metadata.get("rope_style", "half"), style)
    check_equal(f"layer {layer}: head_dim", metadata.get("head_dim", rope.head_dim), rope.head_dim)


def _read_official_layer(layer: int, rope: RopeForm, heads: int, stats: Mapping[str, Any]) -> LayerStatistics:
    bands = rope.rotary_dim // 2
    real, imaginary = rope.pairs
    q_mean, q_abs = np.zeros((heads, rope.head_dim)), np.zeros((heads, bands))
    if not _has_layer(stats, layer):
        raise StatisticsError(f"layer {layer} is missing; {RECALIBRATE}")
    if _official_name(layer, heads) in stats:
        raise StatisticsError(f"layer {layer} has more than the model's {heads} query heads; {RECALIBRATE}")
    for head in range(heads):
        name = _official_name(layer, head)
        if name not in stats:
            raise StatisticsError(f"layer {layer}, head {head} ({name}) is missing; {RECALIBRATE}")
        columns = {key: stats[name][key].detach().double().numpy() for key in _OFFICIAL_ARRAYS}
        for key, column in columns.items():
            if column.shape != (bands,):
                raise StatisticsError(
                    f"layer {layer}, head {head}: {key} has shape {list(column.shape)} instead of [{bands}], "
                    f"half the rotary dim; {RECALIBRATE}"
                )
        q_mean[head, real], q_mean[head, imaginary] = columns["q_mean_real"], columns["q_mean_imag"]
        q_abs[head] = columns["q_abs_mean"]
    return LayerStatistics(layer, rope, q_mean, q_abs)


_OFFICIAL_ARRAYS = ("q_mean_real", "q_mean_imag", "q_abs_mean")


def is_official(path: Path) -> bool:
    """Whether the file is a torch.save archive (a zip), by content, or says so by its suffix."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix in SUFFIXES
