"""Query statistics of a model: how they are gathered, their file, and the check that they fit a model.

Source of the statistics: TriAttention, arXiv 2604.04921: E[q_f] and E|q_f| of every query head, before RoPE.
"""

import json
import os
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "keysieve-statistics"
VERSION = "1"
MEAN_EXCESS = 1e-4  # |E q_f| may exceed E|q_f| by this share: rounding of files that were summed in float32
OFFICIAL_STYLES = {"half_split": "half", "interleaved": "interleaved"}
Identity = Mapping[str, str | int | list[int]]
"""What tells a model from others: names, hashes and sizes."""
RECALIBRATE = "calibrate again with `keysieve calibrate MODEL -o FILE`"


@dataclass(frozen=True)
class LayerStatistics:
    """The query statistics of one attention layer, before RoPE, after q_norm, without the attention scaling.

    q_mean [Hq, D] float64: mean query; band f's complex parts sit at rope.pairs, un-rotated dims too.
    q_abs [Hq, R/2] float64: mean magnitude of every band, E|q_f|.
    Raises StatisticsError, naming layer and tensor, for a wrong shape, NaN or infinity, or E|q_f| < |E q_f|.
    """

    layer: int
    rope: RopeForm
    q_mean: np.ndarray
    q_abs: np.ndarray

    def __post_init__(self) -> None:
        rope, bands = self.rope, self.rope.rotary_dim // 2
        heads = self.q_mean.shape[0] if self.q_mean.ndim else 0
        for name, array, shape in (
            ("inv_freq", rope.inv_freq, (bands,)),
            ("q_mean", self.q_mean, (heads, rope.head_dim)),
            ("q_abs", self.q_abs, (heads, bands)),
        ):
            if array.shape != shape:
                raise StatisticsError(
                    f"layer {self.layer}: {name} has shape {list(array.shape)} instead of {list(shape)}; {RECALIBRATE}"
                )
            if not np.isfinite(array).all():
                raise StatisticsError(f"layer {self.layer}: {name} holds NaN or infinity; {RECALIBRATE}")
        impossible = np.argwhere(self.mean_magnitude > self.q_abs * (1 + MEAN_EXCESS))
        if len(impossible):
            head, band = impossible[0]
            raise StatisticsError(
                f"layer {self.layer}: q_abs of head {head}, band {band} is {self.q_abs[head, band]:.6g}, "
                f"less than |q_mean| {self.mean_magnitude[head, band]:.6g}, which is impossible; "
                f"{RECALIBRATE}"
            )

    @property
    def mean_magnitude(self) -> np.ndarray:
        """|E q_f| [Hq, R/2]."""
        real, imaginary = self.rope.pairs
        magnitude: np.ndarray = np.hypot(self.q_mean[:, real], self.q_mean[:, imaginary])
        return magnitude

    @property
    def resultant(self) -> np.ndarray:
        """Mean resultant length R_f = |E q_f| / E|q_f| [Hq, R/2], 0 to 1; 0 for a dead band (E|q_f| = 0)."""
        resultant = np.zeros(self.q_abs.shape)
        np.divide(self.mean_magnitude, self.q_abs, out=resultant, where=self.q_abs > 0)
        return resultant


@dataclass
class Statistics:
    """The statistics of a whole model and where they come from.

    layers: one entry per attention layer, in model order. tokens: how many were summed so far, out of
    tokens_planned, in sequences of `chunk` tokens. text_sha256: hash of the calibration text. model: identity
    of the model, at least architecture, config_sha256, weights_sha256, layers, query_heads, kv_heads and head_dim (the
    last three are lists of one number a layer where layers differ).
    first_half: the layers over the first first_tokens tokens alone, about half of the text; empty where they are not
    known (a run still in the first half, a text of one chunk, or a file from before they were kept).
    """

    layers: list[LayerStatistics]
    tokens: int
    tokens_planned: int
    text_sha256: str
    model: Identity = field(default_factory=dict)
    chunk: int = 0
    first_half: list[LayerStatistics] = field(default_factory=list)
    first_tokens: int = 0


class QueryMoments:
    """Streaming float64 sums of one layer's queries and of their band magnitudes."""

    def __init__(self, rope: RopeForm, heads: int, layer: int = 0) -> None:
        """Start from nothing, for `heads` query heads of attention layer number `layer`."""
        self.rope = rope
        self.layer = layer
        self.tokens = 0
        self.q_sum = np.zeros((heads, rope.head_dim))
        self.abs_sum = np.zeros((heads, rope.rotary_dim // 2))

    @classmethod
    def resume(cls, statistics: LayerStatistics, tokens: int) -> "QueryMoments":
        """Go on from finished statistics over `tokens` tokens."""
        moments = cls(statistics.rope, statistics.q_mean.shape[0], statistics.layer)
        moments.tokens = tokens
        moments.q_sum = statistics.q_mean * tokens
        moments.abs_sum = statistics.q_abs * tokens
        return moments

    def add(self, q: "Tensor", mask: "Tensor | None" = None) -> None:
        """Add the queries q [B, Hq, N, D], before RoPE; mask [B, N] is true (or 1) where a token counts.

        Raises StatisticsError if q or mask has another shape.
        """
        heads, head_dim = self.q_sum.shape
        if q.ndim != 4 or q.shape[1] != heads or q.shape[3] != head_dim:
            raise StatisticsError(
                f"layer {self.layer}: queries have shape {list(q.shape)} instead of [B, {heads}, N, {head_dim}]"
            )
        by_token = q.detach().cpu().double().numpy().transpose(0, 2, 1, 3)  # [B, N, Hq, D]
        if mask is not None:
            if mask.shape != by_token.shape[:2]:
                raise StatisticsError(
                    f"layer {self.layer}: mask has shape {list(mask.shape)} instead of {list(by_token.shape[:2])}"
                )
            by_token = by_token[mask.detach().cpu().numpy().astype(bool)]
        by_token = by_token.reshape(-1, heads, head_dim)
        real, imaginary = self.rope.pairs
        self.q_sum += by_token.sum(axis=0)
        self.abs_sum += np.hypot(by_token[..., real], by_token[..., imaginary]).sum(axis=0)
        self.tokens += len(by_token)

    def merge(self, other: "QueryMoments") -> None:
        """Add the sums of the same layer over other tokens."""
        self.q_sum += other.q_sum
        self.abs_sum += other.abs_sum
        self.tokens += other.tokens

    def finish(self) -> LayerStatistics:
        """The means so far. Raises StatisticsError if no token was added, or if one was NaN or infinite."""
        if self.tokens == 0:
            raise StatisticsError(f"layer {self.layer}: no token was added; give a longer text")
        return LayerStatistics(self.layer, self.rope, self.q_sum / self.tokens, self.abs_sum / self.tokens)


def save(statistics: Statistics, path: str | Path) -> None:
    """Write the statistics as safetensors; the file appears whole or not at all.

    Tensors (float64) layers.NNN.q_mean, .q_abs and .inv_freq, and where the first half is known layers.NNN.first_q_mean
    and .first_q_abs; everything else is JSON in the file's metadata.
    Raises StatisticsError if the file cannot be written.
    """
    tensors, layers = {}, []
    for entry in statistics.layers:
        arrays = {"q_mean": entry.q_mean, "q_abs": entry.q_abs, "inv_freq": entry.rope.inv_freq}
        for name, array in arrays.items():
            tensors[_tensor_name(entry.layer, name)] = np.ascontiguousarray(array, dtype=np.float64)
        rope = asdict(entry.rope)
        del rope["inv_freq"]
        layers.append({"layer": entry.layer, "rope": rope})
    for entry in statistics.first_half:
        for name, array in {"first_q_mean": entry.q_mean, "first_q_abs": entry.q_abs}.items():
            tensors[_tensor_name(entry.layer, name)] = np.ascontiguousarray(array, dtype=np.float64)
    header = {
        "tokens": statistics.tokens,
        "tokens_planned": statistics.tokens_planned,
        "text_sha256": statistics.text_sha256,
        "model": statistics.model,
        "chunk": statistics.chunk,
        "first_tokens": statistics.first_tokens,
        "layers": layers,
    }
    metadata = {"format": FORMAT, "version": VERSION, "statistics": json.dumps(header)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: str | Path) -> Statistics:
    """Read a file written by `save`.

    Raises StatisticsError, naming the file, if it is missing, damaged, of another format version, or holds
    values that cannot be statistics (see LayerStatistics).
    """
    path = existing(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_version(metadata)
            header = json.loads(metadata["statistics"])
            layers = [_read_layer(file, entry) for entry in header["layers"]]
            first_tokens = int(header.get("first_tokens", 0))
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
        )
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise StatisticsError(f"{path} is no readable safetensors file ({error}); {RECALIBRATE}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path}: damaged metadata ({error!r}); {RECALIBRATE}") from error


def check_matches(
    statistics: Statistics,
    model_identity: Identity,
    ropes: list[RopeForm],
    unknown: Collection[str] = (),
) -> None:
    """Raise StatisticsError, naming the first difference and both values, unless statistics fit the model.

    unknown: identity fields that cannot be checked (a model without weights has no weights_sha256).
    model_identity: the same fields as Statistics.model; ropes: one per attention layer, in model order.
    """
    for name in dict.fromkeys([*model_identity, *statistics.model]):
        if name in unknown:
            continue
        _check_equal(name, statistics.model.get(name), model_identity.get(name))
    _check_equal("number of attention layers", len(statistics.layers), len(ropes))
    for entry, rope in zip(statistics.layers, ropes, strict=True):
        where = f"layer {entry.layer}: rope "
        for name in ("kind", "head_dim", "rotary_dim", "real", "imaginary", "layout"):
            _check_equal(where + name, getattr(entry.rope, name), getattr(rope, name))
        if not np.isclose(entry.rope.scaling, rope.scaling, rtol=1e-5, atol=0):
            _check_equal(where + "scaling", entry.rope.scaling, rope.scaling)
        differs = np.flatnonzero(~np.isclose(entry.rope.inv_freq, rope.inv_freq, rtol=1e-5, atol=0))
        if len(differs):
            band = differs[0]
            _check_equal(f"{where}inv_freq of band {band}", entry.rope.inv_freq[band], rope.inv_freq[band])


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
    if _is_official(existing(path)):
        return load_official(path, model_identity, ropes, query_heads, layers)
    statistics = load(path)
    check_matches(statistics, model_identity, ropes, unknown)
    for entry, heads in zip(statistics.layers, query_heads, strict=True):
        _check_equal(f"layer {entry.layer}: number of query heads", entry.q_mean.shape[0], heads)
    return statistics


def _is_official(path: Path) -> bool:
    """Whether the file is a torch.save archive (a zip), by content, or says so by its suffix."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix in (".pt", ".pth")


def existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise StatisticsError(f"{path}: no such file; make it with `keysieve calibrate MODEL -o {path}`")
    return path


def _tensor_name(layer: int, name: str) -> str:
    return f"layers.{layer:03d}.{name}"


def _official_name(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _has_layer(stats: Mapping[str, Any], layer: int) -> bool:
    return any(name.startswith(f"layer{layer:02d}_") for name in stats)


def write_whole(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Call writer(temporary path) in the target's folder, then move the result into place.

    Raises StatisticsError if that cannot be done.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save
        raise StatisticsError(f"cannot write {path} ({error}); choose a folder that is writable") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise StatisticsError(f"is not a keysieve statistics file; {RECALIBRATE}")
    if metadata.get("version") != VERSION:
        raise StatisticsError(
            f"is of format version {metadata.get('version')}, this keysieve reads {VERSION}; {RECALIBRATE}"
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
    return LayerStatistics(layer, form, arrays["q_mean"], arrays["q_abs"])


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


def _check_official_form(layer: int, rope: RopeForm, metadata: Mapping[str, Any]) -> None:
    style = OFFICIAL_STYLES.get(rope.kind)
    if style is None:
        raise StatisticsError(f"layer {layer} has no RoPE, which the official format cannot hold; {RECALIBRATE}")
    _check_equal(f"layer {layer}: rope_style", metadata.get("rope_style", "half"), style)
    _check_equal(f"layer {layer}: head_dim", metadata.get("head_dim", rope.head_dim), rope.head_dim)


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


def _check_equal(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        shown = ["nothing" if value is None else repr(_plain(value)) for value in (found, expected)]
        raise StatisticsError(
            f"the statistics do not belong to this model: {name} is {shown[0]} in the file "
            f"and {shown[1]} in the model; {RECALIBRATE}"
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
