"""Typed options of calibration, compilation and generation; every check happens here, before any long work."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keysieve.errors import ConfigError
from keysieve.kernels import SCOPES

POLICIES = ("sieve", "triattention", "streaming", "key-norm", "random")
TERMS = ("trig", "gate")
CENTRES = ("calibrated", "online")
HEADS = ("uniform", "classes")
PROMPTS = ("evictable", "pinned")
DTYPES = ("float32", "float16", "bfloat16")
WEIGHTS = ("int8", "int4")
TARGETS = ("onnxruntime", "torch", "tensorrt-rtx", "tensorrt")
ON_TENSORRT = TARGETS[2:]
CALIBRATION_TOKENS = 49152
MOST_BUDGET = 1 << 24  # rows; more than any text has tokens, and few enough for the widest class of heads


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class PolicyConfig:
    """How a key's importance is scored.

    sieve adds terms: trig, the score of triattention, and gate, what the learned gates foretell; None: those that model
    and statistics have (see choose_terms).
    centres: "calibrated" takes the query centres from a statistics file, "online" keeps them as run-time state; None:
    online for sieve, else calibrated. aggregation over the future offsets 1, 2, 4, ..., offset_max; trig and norm
    switch the two terms of the series.
    """

    name: str = "sieve"
    centres: str | None = None
    aggregation: str = "mean"
    offset_max: int = 4096
    trig: bool = True
    norm: bool = True
    terms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _choose("policy", self.name, POLICIES)
        if self.centres is None:
            object.__setattr__(self, "centres", "online" if self.name == "sieve" else "calibrated")
        _choose("centres", str(self.centres), CENTRES)
        if self.terms is not None:
            for term in self.terms:
                _choose("term", term, TERMS)
            if not self.terms:
                raise ConfigError(f"there are no terms, so nothing is left to score; choose some of {', '.join(TERMS)}")
            # In one order, each once.
            object.__setattr__(self, "terms", tuple(term for term in TERMS if term in self.terms))
        _choose("aggregation", self.aggregation, ("mean", "max"))
        if self.offset_max < 1 or self.offset_max & (self.offset_max - 1):
            raise ConfigError(f"offset_max {self.offset_max} must be a power of two, such as 4096")
        if not (self.trig or self.norm):
            raise ConfigError("trig and norm are both off, so nothing is left to score; turn one on")

    @property
    def offsets(self) -> list[int]:
        return [1 << n for n in range(self.offset_max.bit_length())]

    @property
    def trigonometric(self) -> bool:
        """Whether keys are scored by the series in their distance."""
        return self.name == "triattention" or (self.name == "sieve" and "trig" in (self.terms or TERMS))

    @property
    def gated(self) -> bool:
        """Whether rows are worth what a gate foretells, too."""
        return self.name == "sieve" and "gate" in (self.terms or ())

    @property
    def needs_statistics(self) -> bool:
        return self.gated or (self.trigonometric and self.centres == "calibrated")


@dataclass(frozen=True)
class EvictionConfig:
    """What is kept. budget counts every row held after an eviction: sinks, recent and pinned rows included.

    heads: "uniform" gives every KV head as many rows as budget says; "classes" gives them by their shares in the
    statistics, as many on average, in at most head_classes classes of heads that have the same. None: classes for sieve
    where the statistics have shares.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    budget: int = 2048
    interval: int = 128
    sinks: int = 4
    recent: int = 128
    scope: str = "per_layer_per_head"
    prompt: str = "evictable"
    heads: str | None = None
    head_classes: int = 4

    def __post_init__(self) -> None:
        _choose("scope", self.scope, SCOPES)
        if self.heads is None and self.policy.name != "sieve":
            object.__setattr__(self, "heads", "uniform")
        if self.heads is not None:
            _choose("heads", self.heads, HEADS)
        _choose("prompt", self.prompt, PROMPTS)
        for name, least in (("budget", 1), ("interval", 1), ("sinks", 0), ("recent", 0), ("head_classes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        check_budget(self.budget, self.sinks, self.recent)
        if self.heads == "classes" and self.scope != "per_layer_per_head":
            raise ConfigError(
                f"scope {self.scope} keeps the same rows in several heads, so they cannot have budgets of their own; "
                "leave --heads classes out, or choose the scope per_layer_per_head"
            )


def check_budget(budget: int, sinks: int, recent: int) -> None:
    """Raise ConfigError unless the budget leaves room for rows that are chosen by score, and is one of MOST_BUDGET."""
    if budget > MOST_BUDGET:
        raise ConfigError(f"budget {budget:,} is beyond {MOST_BUDGET:,} rows; choose a smaller one")
    if budget <= sinks + recent:
        raise ConfigError(
            f"budget {budget} leaves no row to choose: sinks {sinks} + recent {recent} are always kept; "
            f"raise the budget above {sinks + recent} or lower sinks and recent"
        )


@dataclass(frozen=True)
class TensorRTConfig:
    """What TensorRT engines are built for.

    architectures: GPUs, as compute capability times ten; None: all that TensorRT-RTX gets plans for, or the plugin
    library kernels. batch, capacity (rows of a cache) and chunk (tokens a step) are the most that an engine will take;
    capacity None: as much as budget, interval and chunk need. aliased: TensorRT is told that caches are updated in
    place (larger plans). include: folder of TensorRT's official headers, if they shall be used.
    """

    architectures: tuple[int, ...] | None = None
    batch: int = 8
    capacity: int | None = None
    chunk: int = 512
    aliased: bool = False
    include: Path | None = None


@dataclass(frozen=True)
class CompileConfig:
    """Everything `keysieve compile` needs besides the model and the output folder.

    weights: integers in place of the weights of products, for ONNX Runtime; None: as dtype says. kv_dtype: in which the
    caches hold keys and values; None: dtype.
    """

    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    dtype: str = "float32"
    stats: Path | None = None
    inline: bool = False
    dump_graphs: Path | None = None
    target: str = "onnxruntime"
    tensorrt: TensorRTConfig = field(default_factory=TensorRTConfig)
    weights: str | None = None
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        _choose("dtype", self.dtype, DTYPES)
        _choose("target", self.target, TARGETS)
        if self.inline and self.target != "onnxruntime":
            raise ConfigError(
                f"an inlined file is for the target onnxruntime, not for {self.target}; leave --inline out"
            )
        self._check_storage()
        policy = self.eviction.policy
        if policy.gated and self.target in ON_TENSORRT:
            raise ConfigError(f"the gate is not on {self.target} yet; choose --terms trig or --policy triattention")
        if self.eviction.heads == "classes" and self.target in ON_TENSORRT:
            raise ConfigError(
                f"{self.target} takes one budget for all heads as yet; leave --heads and --head-classes out"
            )
        if policy.gated and self.stats is None:
            raise ConfigError(
                "the term gate needs the gates of a statistics file: give --stats FILE (made by `keysieve calibrate "
                "MODEL -o FILE`), or choose --terms trig"
            )
        if policy.needs_statistics and self.stats is None:
            raise ConfigError(
                f"policy {policy.name} with calibrated centres needs a statistics file: give --stats FILE "
                "(made by `keysieve calibrate MODEL -o FILE`), or use --centres online"
            )
        if self.eviction.heads == "classes" and self.stats is None:
            raise ConfigError(
                "head budgets follow the shares of the heads in a statistics file: give --stats FILE (made by "
                "`keysieve calibrate MODEL -o FILE`), or leave --heads out"
            )
        if self.stats is not None and not (policy.trigonometric or policy.gated) and self.eviction.heads != "classes":
            raise ConfigError(f"policy {policy.name} uses no statistics; leave --stats out")

    @property
    def cache_dtype(self) -> str:
        """In which the caches hold keys and values."""
        return self.kv_dtype or self.dtype

    def _check_storage(self) -> None:
        """Weights and caches of another type than the activations are ONNX Runtime's."""
        if self.weights is not None:
            _choose("weights", self.weights, WEIGHTS)
        if self.kv_dtype is not None:
            _choose("kv-dtype", self.kv_dtype, DTYPES)
        for option, value in (("--weights", self.weights), ("--kv-dtype", self.kv_dtype)):
            if value is None or value == self.dtype:
                continue
            if self.target != "onnxruntime":
                raise ConfigError(f"{option} {value} is for ONNX Runtime; leave it out for target {self.target}")
            if self.dtype != "float32":
                raise ConfigError(f"{option} {value} needs activations in float32; leave --dtype {self.dtype} out")
        if self.weights and self.inline:
            raise ConfigError("--weights makes nodes that only ONNX Runtime knows; leave --inline out")


def as_dict(config: Any) -> dict[str, Any]:
    """A JSON-ready dict of a config dataclass."""
    from dataclasses import asdict

    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
