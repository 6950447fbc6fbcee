"""What benchmarks/cpu.py makes of its samples: medians, eviction rounds, ratios of pairs, and the targets they meet."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One side of a comparison. history: prompt tokens; budget: rows kept (None: all)."""

    contestant: str
    policy: str
    weights: str
    kv_dtype: str
    history: int
    budget: int | None
    batch: int = 1

    def __str__(self) -> str:
        policy = "" if self.policy in ("dense", "plain", "triattention") else f" {self.policy}"
        return f"{self.contestant}{policy} {self.weights}/{self.kv_dtype}"


def entry_of(row: Mapping[str, Any]) -> Entry:
    """Whose row it is."""
    return Entry(**{name: row[name] for name in Entry.__annotations__})


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart; of two with the same, the newer one is kept."""
    return row["workload"], row["threads"], entry_of(row)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of both, sorted; a new one replaces the old one with its identity."""
    rows = {identity(row): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1], key[2].history, str(key)))]


def round_seconds(turns: Sequence[Sequence[float]]) -> float:
    """What one eviction round adds to an interval, from the seconds of every step of several intervals.

    A round comes at the same step of every interval, so the median over turns leaves it and drops what else disturbed a
    step. Of these medians, it is the two neighbours that take most, above the usual: keysieve scores and selects in one
    step and compacts in the next, others do all in one.
    """
    steps = [statistics.median(step) for step in zip(*turns, strict=True)]
    return max(first + second for first, second in pairwise(steps)) - 2 * statistics.median(steps)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, Any]:
    """Ratios of the pairs that were measured one after the other, and their median."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(pairs), "pairs": pairs}


def compare(
    workload: str, numerator: Entry, denominator: Entry, samples: Mapping[Entry, Sequence[Mapping[str, float]]]
) -> tuple[str, dict[str, Any]]:
    """Name and content of one ratio, numerator's time / denominator's time, by wall clock and by CPU time."""
    sides = {"numerator": numerator, "denominator": denominator}
    name = f"{workload}: {_named(numerator)} / {_named(denominator)}"
    clocks = {
        clock: ratio(
            [sample[f"{clock}_s"] for sample in samples[numerator]],
            [sample[f"{clock}_s"] for sample in samples[denominator]],
        )
        for clock in ("wall", "cpu")
    }
    return name, {"workload": workload, **{side: asdict(entry) for side, entry in sides.items()}, **clocks}


def _named(entry: Entry) -> str:
    kept = "" if entry.budget is None else f" to {entry.budget}"
    return f"{entry} {entry.history}{kept} x{entry.batch}"


@dataclass(frozen=True)
class Target:
    """A bound on something measured. of: the whole result -> (what it is of, the value) for all that it applies to."""

    text: str
    bound: float
    of: Callable[[Mapping[str, Any]], list[tuple[str, float]]]
    at_least: bool = False

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratios(
    workload: str, inverted: bool = False, same: str | None = None, **wanted: Any
) -> Callable[[Mapping[str, Any]], Any]:
    """CPU time ratios of a workload.

    wanted: numerator_FIELD or denominator_FIELD, and its value or a tuple of them; same: a field equal on both sides.
    """

    def fits(found: Mapping[str, Any]) -> bool:
        for key, value in wanted.items():
            side, name = key.split("_", 1)
            if found[side][name] not in (value if isinstance(value, tuple) else (value,)):
                return False
        alike = same is None or found["numerator"][same] == found["denominator"][same]
        return alike and bool(found["workload"] == workload)

    def of(result: Mapping[str, Any]) -> list[tuple[str, float]]:
        chosen = {name: found["cpu"]["median"] for name, found in result["ratios"].items() if fits(found)}
        return [(name, 1 / value if inverted else value) for name, value in chosen.items()]

    return of


def _rows(workload: str, value: Callable[[Row], float], **wanted: Any) -> Callable[[Mapping[str, Any]], Any]:
    def of(result: Mapping[str, Any]) -> list[tuple[str, float]]:
        rows = [row for row in result["rows"] if row["workload"] == workload]
        return [
            (_named(entry_of(row)), value(row))
            for row in rows
            if all(row[name] == expected for name, expected in wanted.items())
        ]

    return of


def _decode(rival: str, weights: str, inverted: bool = False, **wanted: Any) -> Callable[[Mapping[str, Any]], Any]:
    """keysieve against a rival while decoding."""
    sides = {"numerator_contestant": "keysieve", "numerator_weights": weights, "denominator_contestant": rival}
    return _ratios("decode", inverted, **{**sides, **wanted})


def _dense(weights: str, **wanted: Any) -> Callable[[Mapping[str, Any]], Any]:
    """The same engine keeping every row in the same type, against keysieve, while decoding."""
    return _decode("keysieve-dense", weights, True, same="kv_dtype", **wanted)


def _peak(row: Row) -> float:
    return float(row["peak_rss"] / 1e6)


AT_8K = {"numerator_history": 8192, "numerator_batch": 1}
FEW_OR_MANY = {**AT_8K, "numerator_budget": (512, 2048)}
U8 = {"denominator_kv_dtype": "u8"}
FLOAT32 = {"denominator_kv_dtype": "float32"}
KEYSIEVE_INT4 = {"contestant": "keysieve", "weights": "int4"}
TARGETS = [
    Target("int4: OpenVINO GenAI's time per token", 0.75, _decode("openvino-genai", "int4", **FEW_OR_MANY, **U8)),
    Target("int4: llama.cpp's window shift", 1.05, _decode("llama.cpp", "int4", **FEW_OR_MANY)),
    Target("int4: ONNX Runtime's plain decode at the same rows", 1.06, _decode("onnxruntime", "int4", **FEW_OR_MANY)),
    Target("float32: OpenVINO GenAI in float32", 0.85, _decode("openvino-genai", "float32", **AT_8K, **FLOAT32)),
    Target("int4: tokens/s of kvpress in float32", 5, _decode("kvpress", "int4", True, **FEW_OR_MANY), at_least=True),
    Target(
        "int4: tokens/s of the paper's code in float32",
        5,
        _decode("official", "int4", True, **FEW_OR_MANY),
        at_least=True,
    ),
    Target(
        "int4, 8k to 2048: dense / evicting",
        3.0,
        _dense("int4", **AT_8K, numerator_budget=2048),
        at_least=True,
    ),
    Target(
        "int4, 8k to 512: dense / evicting",
        5.0,
        _dense("int4", **AT_8K, numerator_budget=512),
        at_least=True,
    ),
    Target(
        "float32, batch 8, 8k to 2048: dense / evicting",
        2.7,
        _dense("float32", numerator_history=8192, numerator_batch=8, numerator_budget=2048),
        at_least=True,
    ),
    Target("time per token at 32k / at 4k", 1.05, _ratios("length")),
    Target("one round at 512, ms", 5, _rows("round", lambda row: row["round_ms_cpu"], budget=512)),
    Target("one round at 2048, ms", 15, _rows("round", lambda row: row["round_ms_cpu"], budget=2048)),
    Target("rounds, share of decode time", 0.015, _rows("round", lambda row: row["round_share"])),
    Target("a step that is not due, us", 20, _rows("round", lambda row: row["idle_us_cpu"])),
    Target("one round / one copy of K and V", 2, _rows("round", lambda row: row["round_ms_cpu"] / row["copy_ms_cpu"])),
    Target("peak resident MB at 512", 200, _rows("memory", _peak, budget=512, **KEYSIEVE_INT4)),
    Target("peak resident MB at 2048", 300, _rows("memory", _peak, budget=2048, **KEYSIEVE_INT4)),
    Target("prefill of 8k: OpenVINO GenAI's time", 1.0, _ratios("prefill", denominator_contestant="openvino-genai")),
    Target("100,000 tokens: growth of resident memory", 0.05, _rows("endless", lambda row: row["rss_drift"])),
]
