"""What is known of a model's queries and keys from calibration, and the check that it fits a model.

Source of the statistics: TriAttention, arXiv 2604.04921: E[q_f] and E|q_f| of every query head, before RoPE. Source of
the gates: KVzap, arXiv 2601.07891.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

MEAN_EXCESS = 1e-4  # |E q_f| may exceed E|q_f| by this share: rounding of files that were summed in float32
Identity = Mapping[str, str | int | list[int]]
"""What tells a model from others: names, hashes and sizes."""
RECALIBRATE = "calibrate again with `keysieve calibrate MODEL -o FILE`"


@dataclass(frozen=True)
class LayerStatistics:
    """The query statistics of one attention layer, before RoPE, after q_norm, without the attention scaling.

    q_mean [Hq, D] float64: mean query; band f's complex parts sit at rope.pairs, un-rotated dims too.
    q_abs [Hq, R/2] float64: mean magnitude of every band, E|q_f|.
    What was learned beside them, None where it was not: gate_weight [Hkv, d] and gate_bias [Hkv] float32, the gate
    u = gate_weight h + gate_bias of every KV head in nats, where h [d] is what the layer's q, k and v projections read;
    gate_fit [Hkv]: its correlation with the labels of texts that it did not learn from; share [n, Hkv] float32: how
    many rows the head wants on average, as a multiple of what the average head gets, at each of Learned.budgets.
    Raises StatisticsError, naming layer and tensor, for a wrong shape, NaN or infinity, E|q_f| < |E q_f|, or a share
    that is not positive.
    """

    layer: int
    rope: RopeForm
    q_mean: np.ndarray
    q_abs: np.ndarray
    gate_weight: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    gate_fit: np.ndarray | None = None
    share: np.ndarray | None = None

    def __post_init__(self) -> None:
        rope, bands = self.rope, self.rope.rotary_dim // 2
        heads = self.q_mean.shape[0] if self.q_mean.ndim else 0
        self._check("inv_freq", rope.inv_freq, (bands,))
        self._check("q_mean", self.q_mean, (heads, rope.head_dim))
        self._check("q_abs", self.q_abs, (heads, bands))
        impossible = np.argwhere(self.mean_magnitude > self.q_abs * (1 + MEAN_EXCESS))
        if len(impossible):
            head, band = impossible[0]
            raise StatisticsError(
                f"layer {self.layer}: q_abs of head {head}, band {band} is {self.q_abs[head, band]:.6g}, "
                f"less than |q_mean| {self.mean_magnitude[head, band]:.6g}, which is impossible; "
                f"{RECALIBRATE}"
            )

        self._check_learned()

    def _check_learned(self) -> None:
        weight, bias = self.gate_weight, self.gate_bias
        if (weight is None) != (bias is None):
            missing, there = ("weight", "bias") if weight is None else ("bias", "weight")
            raise StatisticsError(f"layer {self.layer}: gate_{missing} is missing beside gate_{there}; {RECALIBRATE}")
        kv_heads, width = (None, None) if weight is None or weight.ndim != 2 else weight.shape
        if weight is not None and bias is not None:
            self._check("gate_weight", weight, (bias.shape[0] if bias.ndim else 0, width or 1))
            self._check("gate_bias", bias, (kv_heads,))
        if self.gate_fit is not None:
            self._check("gate_fit", self.gate_fit, (kv_heads,))
        if self.share is not None:
            budgets, heads = self.share.shape if self.share.ndim == 2 else (1, 0)
            self._check("share", self.share, (max(budgets, 1), kv_heads or heads or 1))
            wrong = np.argwhere(self.share <= 0)
            if len(wrong):
                budget, head = wrong[0]
                raise StatisticsError(
                    f"layer {self.layer}: share of KV head {head} at budget {budget} is "
                    f"{self.share[budget, head]:.6g}, and must be positive; {RECALIBRATE}"
                )

    def _check(self, name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> None:
        if array.shape != shape:
            raise StatisticsError(
                f"layer {self.layer}: {name} has shape {list(array.shape)} instead of {list(shape)}; {RECALIBRATE}"
            )
        if not np.isfinite(array).all():
            raise StatisticsError(f"layer {self.layer}: {name} holds NaN or infinity; {RECALIBRATE}")

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
class Learned:
    """How gates and shares are learned: from contexts of context_tokens tokens, then held_out ones, then texts.

    budgets: the average rows a head at which shares are measured, on texts of share_context tokens; both empty and 0
    where the model or the text is too short for any. seed: of the synthetic facts. done: how many contexts and texts
    are behind us. sums: layer -> name -> what is summed so far in the phase that is not finished.
    """

    seed: int
    contexts: int
    held_out: int
    texts: int
    context_tokens: int
    share_context: int
    budgets: list[int]
    done: int = 0
    sums: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def planned(self) -> int:
        """How many contexts and texts there are in all."""
        return self.contexts + self.held_out + self.texts

    @property
    def finished(self) -> bool:
        """Whether gates and shares are there."""
        return self.done >= self.planned


@dataclass
class Statistics:
    """The statistics of a whole model and where they come from.

    layers: one entry per attention layer, in model order. tokens: how many were summed so far, out of
    tokens_planned, in sequences of `chunk` tokens. text_sha256: hash of the calibration text. model: identity
    of the model, at least architecture, config_sha256, weights_sha256, layers, query_heads, kv_heads and head_dim (the
    last three are lists of one number a layer where layers differ).
    first_half: the layers over the first first_tokens tokens alone, about half of the text; empty where they are not
    known (a run still in the first half, a text of one chunk, or a file from before they were kept).
    learned: how gates and shares came about, and how far; None where there are none.
    """

    layers: list[LayerStatistics]
    tokens: int
    tokens_planned: int
    text_sha256: str
    model: Identity = field(default_factory=dict)
    chunk: int = 0
    first_half: list[LayerStatistics] = field(default_factory=list)
    first_tokens: int = 0
    learned: "Learned | None" = None


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
        check_equal(name, statistics.model.get(name), model_identity.get(name))
    check_equal("number of attention layers", len(statistics.layers), len(ropes))
    for entry, rope in zip(statistics.layers, ropes, strict=True):
        where = f"layer {entry.layer}: rope "
        for name in ("kind", "head_dim", "rotary_dim", "real", "imaginary", "layout"):
            check_equal(where + name, getattr(entry.rope, name), getattr(rope, name))
        if not np.isclose(entry.rope.scaling, rope.scaling, rtol=1e-5, atol=0):
            check_equal(where + "scaling", entry.rope.scaling, rope.scaling)
        differs = np.flatnonzero(~np.isclose(entry.rope.inv_freq, rope.inv_freq, rtol=1e-5, atol=0))
        if len(differs):
            band = differs[0]
            check_equal(f"{where}inv_freq of band {band}", entry.rope.inv_freq[band], rope.inv_freq[band])


def check_equal(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        shown = ["nothing" if value is None else repr(_plain(value)) for value in (found, expected)]
        raise StatisticsError(
            f"the statistics do not belong to this model: {name} is {shown[0]} in the file "
            f"and {shown[1]} in the model; {RECALIBRATE}"
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
