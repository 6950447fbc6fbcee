"""What statistics say about a model: whether its queries gather around centres, and whether these hold still."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler.statistics import LayerStatistics, Statistics
from keysieve.compiler.statistics_file import load
from keysieve.compiler.statistics_picture import Row, picture
from keysieve.compiler.whole_file import write_whole
from keysieve.errors import ConfigError

LEAST = 0.5  # of amplitude-weighted R; below it the centre describes less than half of the queries
FORMATS = (".svg", ".json")
NAMED = 3  # layers that a warning names


@dataclass(frozen=True)
class LayerFit:
    """How well centres describe one attention layer; without RoPE it has no bands, and resultant and drift are None.

    resultant: sum |E q_f| / sum E|q_f| over heads and bands, 0 to 1: the mean resultant length R_f = |E q_f| / E|q_f|
    weighted by amplitude. drift: sum |E2 q_f - E1 q_f| / sum E|q_f|, how far the centres moved from the first half of
    the text to the second; None where the halves are unknown. amplitude: mean E|q_f|. dead: how many bands of heads are
    always 0; they have no weight. bands [R/2]: R of every band over the heads, the fastest band first. gate: the gates'
    correlation with labels that they did not learn from, mean over the KV heads; None without gates. shares: of every
    KV head [Hkv], one list for each budget; empty without them.
    """

    layer: int
    rope: str
    resultant: float | None
    drift: float | None
    amplitude: float
    dead: int
    bands: list[float]
    gate: float | None = None
    shares: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class StatisticsReport:
    """The same over all layers, and from how many tokens; tokens_by_half is empty where the halves are unknown.

    share_budgets: the average rows a head at which shares were measured, on texts of share_context tokens.
    """

    architecture: str
    tokens: int
    tokens_planned: int
    tokens_by_half: list[int]
    resultant: float | None
    drift: float | None
    layers: list[LayerFit]
    gate: float | None = None
    share_budgets: list[int] = field(default_factory=list)
    share_context: int = 0

    @property
    def doubt(self) -> str:
        """Why calibrated centres will hardly serve this model; "" where nothing speaks against them."""
        if self.resultant is None or self.resultant >= LEAST:
            return ""
        worst = ", ".join(f"{layer.layer} (R {layer.resultant:.2f})" for layer in self.weakest(NAMED))
        return (
            f"amplitude-weighted R is {self.resultant:.2f}, below {LEAST}: the queries of this model hardly gather "
            f"around centres{f', least in layers {worst}' if worst else ''}; expect little of calibrated centres, and "
            "measure what they cost with `keysieve compare`, or take another --policy"
        )

    def weakest(self, count: int) -> list[LayerFit]:
        """The layers of least R, those that are dead as a whole left out."""
        alive = [layer for layer in self.layers if layer.resultant is not None and layer.amplitude > 0]
        return sorted(alive, key=lambda layer: layer.resultant or 0.0)[:count]

    def widest(self, count: int, budget: int) -> list[tuple[int, int, float]]:
        """(layer, KV head, share) of the largest shares at share_budgets[budget]."""
        shares = [
            (fit.layer, at, one) for fit in self.layers if fit.shares for at, one in enumerate(fit.shares[budget])
        ]
        return sorted(shares, key=lambda share: -share[2])[:count]

    @property
    def middle(self) -> int:
        """The index of the budget whose shares stand for all where there is room for one."""
        return (len(self.share_budgets) - 1) // 2

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    def to_svg(self) -> str:
        """R of every layer and band as a picture; beside it the gates' correlation, and the shares of the heads."""
        halves = " + ".join(f"{tokens:,}" for tokens in self.tokens_by_half)
        title = f"{self.architecture}: mean resultant length R of pre-RoPE queries"
        facts = [f"{self.tokens:,} tokens", f"amplitude-weighted R {shown(self.resultant)}"]
        facts += [f"drift {shown(self.drift)} between halves of {halves} tokens"] if halves else []
        rows = [
            Row(
                str(fit.layer),
                fit.bands,
                shown(fit.resultant),
                shown(fit.drift),
                shown(fit.gate) if self.gate is not None else "",
                fit.shares[self.middle] if fit.shares else (),
            )
            for fit in self.layers
        ]
        named = f"of rows, at budget {self.share_budgets[self.middle]:,}" if self.share_budgets else ""
        return picture(title, ", ".join(facts), rows, named)


def statistics_report(statistics: Statistics | str | Path) -> StatisticsReport:
    """Report on statistics or their file (of keysieve's own format); nothing in it is NaN, whatever is 0.

    Raises StatisticsError as `statistics.load` does.
    """
    if not isinstance(statistics, Statistics):
        statistics = load(statistics)
    halves: list[tuple[LayerStatistics, np.ndarray]] | None = None
    second_tokens = statistics.tokens - statistics.first_tokens
    if statistics.first_half and second_tokens > 0:
        halves = [
            (first, (whole.q_mean * statistics.tokens - first.q_mean * statistics.first_tokens) / second_tokens)
            for first, whole in zip(statistics.first_half, statistics.layers, strict=True)
        ]
    fits, sums = [], np.zeros(3)
    for index, layer in enumerate(statistics.layers):
        mean, magnitude = layer.mean_magnitude, layer.q_abs
        moved = _distance(*halves[index]) if halves else np.zeros_like(magnitude)
        totals = np.array([mean.sum(), moved.sum(), magnitude.sum()])
        sums += totals
        rotary = magnitude.size > 0
        fits.append(
            LayerFit(
                layer.layer,
                str(layer.rope),
                _share(totals[0], totals[2]) if rotary else None,
                _share(totals[1], totals[2]) if rotary and halves else None,
                float(magnitude.mean()) if rotary else 0.0,
                int((magnitude == 0).sum()),
                [_share(*band) for band in zip(mean.sum(axis=0), magnitude.sum(axis=0), strict=True)],
                None if layer.gate_fit is None else float(layer.gate_fit.mean()),
                [] if layer.share is None else layer.share.astype(float).tolist(),
            )
        )
    rotary = any(fit.bands for fit in fits)
    return StatisticsReport(
        str(statistics.model.get("architecture", "unknown model")),
        statistics.tokens,
        statistics.tokens_planned,
        [statistics.first_tokens, second_tokens] if halves else [],
        _share(sums[0], sums[2]) if rotary else None,
        _share(sums[1], sums[2]) if rotary and halves else None,
        fits,
        float(np.mean(gates)) if (gates := [fit.gate for fit in fits if fit.gate is not None]) else None,
        statistics.learned.budgets if statistics.learned and any(fit.shares for fit in fits) else [],
        statistics.learned.share_context if statistics.learned else 0,
    )


def write_report(report: StatisticsReport, path: str | Path) -> None:
    """Write the picture (.svg) or the numbers (.json). Raises ConfigError for another suffix."""
    path = Path(path)
    check_format(path)
    text = report.to_svg() if path.suffix == ".svg" else json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_format(path: Path) -> None:
    """Raise ConfigError unless a report can be written under that name."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"a report is {' or '.join(FORMATS)}, not {path.suffix or 'without a suffix'!r}: {path}")


def shown(value: float | None) -> str:
    """A measure as tables and the picture show it."""
    return "-" if value is None else f"{value:.3f}"


def _share(part: float, whole: float) -> float:
    """part / whole; 0 of nothing, as R of a dead band is 0."""
    return float(part / whole) if whole > 0 else 0.0


def _distance(first: LayerStatistics, second_mean: np.ndarray) -> np.ndarray:
    """|E2 q_f - E1 q_f| [Hq, R/2]."""
    real, imaginary = first.rope.pairs
    moved = second_mean - first.q_mean
    distance: np.ndarray = np.hypot(moved[:, real], moved[:, imaginary])
    return distance
