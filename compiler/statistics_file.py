"""The statistics file, safetensors, and reading a file of either format."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keysieve.compiler.official_statistics import OFFICIAL_STYLES, SUFFIXES, is_official, load_official
from keysieve.compiler.statistics import (
    RECALIBRATE,
    Identity,
    LayerStatistics,
    Learned,
    Statistics,
    check_equal,
    check_matches,
)
from keysieve.compiler.whole_file import existing, write_whole
from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

FORMAT = "keysieve-statistics"
VERSION = "3"  # 1 had no gates and no shares
READABLE = ("1", VERSION)
LEARNED = ("gate_weight", "gate_bias", "gate_fit", "share")


def save(statistics: Statistics, path: str | Path) -> None:
    """Write the statistics as safetensors; the file appears whole or not at all.

    Tensors (float64) layers.NNN.q_mean, .q_abs and .inv_freq, and where the first half is known layers.NNN.first_q_mean
    and .first_q_abs; where gates were learned (float32) .gate_weight, .gate_bias, .gate_fit and .share, or, as long as
    they are not finished (float64), sums as .sum_NAME; everything else is JSON in the file's metadata.
    Raises StatisticsError if the file cannot be written.
    """
    tensors, layers = {}, []
    for entry in statistics.layers:
        arrays = {"q_mean": entry.q_mean, "q_abs": entry.q_abs, "inv_freq": entry.rope.inv_freq}
        for name, array in arrays.items():
            tensors[_tensor_name(entry.layer, name)] = np.ascontiguousarray(array, dtype=np.float64)
        for name in LEARNED:
            if (learned := getattr(entry, name)) is not None:
                tensors[_tensor_name(entry.layer, name)] = np.ascontiguousarray(learned, dtype=np.float32)
        rope = asdict(entry.rope)
        del rope["inv_freq"]
        layers.append({"layer": entry.layer, "rope": rope})
    for entry in statistics.first_half:
        for name, array in {"first_q_mean": entry.q_mean, "first_q_abs": entry.q_abs}.items():
            tensors[_tensor_name(entry.layer, name)] = np.ascontiguousarray(array, dtype=np.float64)
    learned = None
    if statistics.learned:
        learned = {entry.name: getattr(statistics.learned, entry.name) for entry in fields(Learned)}
        for layer, sums in learned.pop("sums").items():
            for name, array in sums.items():
                tensors[_tensor_name(layer, f"sum_{name}")] = np.ascontiguousarray(array, dtype=np.float64)
    header = {
        "tokens": statistics.tokens,
        "tokens_planned": statistics.tokens_planned,
        "text_sha256": statistics.text_sha256,
        "model": statistics.model,
        "chunk": statistics.chunk,
        "first_tokens": statistics.first_tokens,
        "layers": layers,
        "learned": learned,
        **_summary(statistics),
    }
    metadata = {"format": FORMAT, "version": VERSION, "statistics": json.dumps(header)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: str | Path) -> Statistics:
    """Read a file written by `save`.

    Raises StatisticsError, naming the file, if it is missing, damaged, of another format version, or holds
    values that cannot be statistics (see LayerStatistics).
    """
    path = existing(path)
    if path.suffix in SUFFIXES:
        raise StatisticsError(
            f"{path} has the TriAttention format, which `keysieve compile --stats` takes, but no sums to report on or "
            "to go on from; name a .safetensors file of `keysieve calibrate`"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_version(metadata)
            header = json.loads(metadata["statistics"])
            layers = [_read_layer(file, entry) for entry in header["layers"]]
            first_tokens = int(header.get("first_tokens", 0))
            learned = _read_learned(file, header)
            first_half = [_read_first_half(file, layer) for layer in layers] if first_tokens else []
        return Statistics(
            layers,
            int(header["tokens"]),
            int(header["tokens_planned"]),
            str(header["text_sha256"]),
            dict(header["model"]),
            int(header["chunk"]),
            first_half,
            first_tokens,
            learned,
        )
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise StatisticsError(f"{path} is no readable safetensors file ({error}); {RECALIBRATE}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path}: damaged metadata ({error!r}); {RECALIBRATE}") from error


def _tensor_name(layer: int, name: str) -> str:
    return f"layers.{layer:03d}.{name}"


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise StatisticsError(f"is not a keysieve statistics file; {RECALIBRATE}")
    if metadata.get("version") not in READABLE:
        raise StatisticsError(
            f"is of format version {metadata.get('version')}, this keysieve reads {' and '.join(READABLE)}; "
            f"{RECALIBRATE}"
        )


def _read_layer(file: Any, entry: Mapping[str, Any]) -> LayerStatistics:
    layer, rope = int(entry["layer"]), entry["rope"]
    arrays, names = {}, set(file.keys())
    for name in ("inv_freq", "q_mean", "q_abs"):
        tensor = _tensor_name(layer, name)
        if tensor not in names:
            raise StatisticsError(f"layer {layer}: tensor {tensor} is missing; {RECALIBRATE}")
        dtype = file.get_slice(tensor).get_dtype()
        if dtype != "F64":
            raise StatisticsError(f"layer {layer}: {name} is of type {dtype} instead of F64; {RECALIBRATE}")
        arrays[name] = file.get_tensor(tensor)
    form = RopeForm(
        kind=str(rope["kind"]),
        head_dim=int(rope["head_dim"]),
        rotary_dim=int(rope["rotary_dim"]),
        inv_freq=arrays["inv_freq"],
        scaling=float(rope["scaling"]),
        **{name: tuple(map(int, rope.get(name, ()))) for name in ("real", "imaginary", "layout")},
    )
    if form.kind == "paired":
        _check_pairs(layer, form)
    elif form.kind not in (*OFFICIAL_STYLES, "nope") or not 0 <= form.rotary_dim <= form.head_dim:
        raise StatisticsError(
            f"layer {layer}: there is no rope {form.kind!r} with rotary_dim {form.rotary_dim} of head_dim "
            f"{form.head_dim}; {RECALIBRATE}"
        )
    learned = {name: _read_float32(file, layer, name) for name in LEARNED if _tensor_name(layer, name) in names}
    return LayerStatistics(layer, form, arrays["q_mean"], arrays["q_abs"], **learned)


def _read_float32(file: Any, layer: int, name: str) -> np.ndarray:
    tensor = _tensor_name(layer, name)
    dtype = file.get_slice(tensor).get_dtype()
    if dtype != "F32":
        raise StatisticsError(f"layer {layer}: {name} is of type {dtype} instead of F32; {RECALIBRATE}")
    array: np.ndarray = file.get_tensor(tensor)
    return array


def _read_learned(file: Any, header: Mapping[str, Any]) -> Learned | None:
    told = header.get("learned")
    if told is None:
        return None
    sums: dict[int, dict[str, np.ndarray]] = {}
    for name in file.keys():  # noqa: SIM118
        _, layer, what = name.split(".", 2)
        if what.startswith("sum_"):
            sums.setdefault(int(layer), {})[what.removeprefix("sum_")] = file.get_tensor(name)
    counts = {entry.name: int(told[entry.name]) for entry in fields(Learned) if entry.name not in ("budgets", "sums")}
    return Learned(**counts, budgets=[int(budget) for budget in told["budgets"]], sums=sums)


def _summary(statistics: Statistics) -> dict[str, Any]:
    """What others read most, by plain names; nothing here is read back."""
    if not statistics.learned:
        return {}
    fits = {entry.layer: entry.gate_fit for entry in statistics.layers if entry.gate_fit is not None}
    return {
        "share_budgets": statistics.learned.budgets,
        "share_context": statistics.learned.share_context,
        "gate_correlation": {str(layer): round(float(fit.mean()), 4) for layer, fit in fits.items()},
    }


def _read_first_half(file: Any, whole: LayerStatistics) -> LayerStatistics:
    q_mean, q_abs = (file.get_tensor(_tensor_name(whole.layer, name)) for name in ("first_q_mean", "first_q_abs"))
    return LayerStatistics(whole.layer, whole.rope, q_mean, q_abs)


def _check_pairs(layer: int, form: RopeForm) -> None:
    pairs, dims = sorted((*form.real, *form.imaginary)), set(range(form.head_dim))
    once = len(set(pairs)) == len(pairs) == form.rotary_dim and len(form.real) == len(form.imaginary)
    if not once or not set(pairs) <= dims or len(form.layout) != form.head_dim or set(form.layout) != dims:
        raise StatisticsError(
            f"layer {layer}: the pairs {form.real} and {form.imaginary} with layout {form.layout} are no RoPE of "
            f"{form.rotary_dim} of {form.head_dim} dims; {RECALIBRATE}"
        )


def read(
    path: str | Path,
    model_identity: Identity,
    ropes: list[RopeForm],
    query_heads: list[int],
    unknown: Collection[str] = (),
    layers: Sequence[int] | None = None,
) -> Statistics:
    """Read a statistics file of either format and check that it belongs to the model.

    query_heads: the number of query heads of every layer that evicts; layers: their numbers among all layers with
    attention, by which the official format calls them (None: 0, 1, ...). Raises StatisticsError as `load`,
    `load_official` and `check_matches` do.
    """
    if is_official(existing(path)):
        return load_official(path, model_identity, ropes, query_heads, layers)
    statistics = load(path)
    check_matches(statistics, model_identity, ropes, unknown)
    for entry, heads in zip(statistics.layers, query_heads, strict=True):
        check_equal(f"layer {entry.layer}: number of query heads", entry.q_mean.shape[0], heads)
    return statistics
