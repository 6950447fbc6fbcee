"""What the GPU kernels of one model are specialised for, checked before anything is compiled."""

from dataclasses import dataclass
from typing import Any

from keysieve.errors import ConfigError
from keysieve.kernels import SCOPES

DTYPES = ("float16", "bfloat16", "float32")
POLICIES = ("trig", "key_norm", "streaming", "random")
MAX_HEAD_DIM = 256
MAX_GROUP = 16
MAX_CAPACITY = 65536


@dataclass(frozen=True)
class KernelConfiguration:
    """Everything that is constant in the kernels: L, Hq, Hkv, D, Dv, R, J, the cache's dtype and the policy.

    `offsets` is J, the rows of centres per head (1 for the mean over the offsets); `rotary_dim` is R <= D.
    Raises ConfigError for what no kernel can be built for.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    dtype: str
    interleaved: bool = False
    offsets: int = 1
    policy: str = "trig"
    scope: str = "per_layer_per_head"
    sinks: int = 4
    recent: int = 128

    def __post_init__(self) -> None:
        for name in ("layers", "query_heads", "kv_heads", "offsets"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("sinks", "recent"):
            _check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("head_dim", "value_dim"):
            size = getattr(self, name)
            _check(
                0 < size <= MAX_HEAD_DIM and size % 8 == 0,
                f"{name} is {size}; the GPU kernels take multiples of 8 up to {MAX_HEAD_DIM}",
            )
        _check(
            0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim is {self.rotary_dim}; it must be even and at most head_dim ({self.head_dim})",
        )
        _check(
            self.query_heads % self.kv_heads == 0 and self.group <= MAX_GROUP,
            f"{self.query_heads} query heads on {self.kv_heads} KV heads: the GPU kernels take 1 to {MAX_GROUP} "
            "query heads for every KV head",
        )
        for name, known in (("dtype", DTYPES), ("policy", POLICIES), ("scope", SCOPES)):
            _check(getattr(self, name) in known, f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")

    @classmethod
    def of_nodes(
        cls, attributes: dict[str, Any], layers: int, head_dim: int, value_dim: int, offsets: int, dtype: str
    ) -> "KernelConfiguration":
        """From the attributes of a score and a select node, put together, and the sizes of their tensors."""
        names = ("query_heads", "kv_heads", "rotary_dim", "policy", "scope", "sinks", "recent")
        return cls(
            layers=layers,
            head_dim=head_dim,
            value_dim=value_dim,
            offsets=offsets if attributes["policy"] == "trig" else 1,  # others have a centre of one row, unused
            interleaved=bool(attributes["interleaved"]),
            dtype=dtype,
            **{name: attributes[name] for name in names},
        )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def plan_layers(self) -> int:
        """Lp: 1 if all layers share a plan."""
        return self.layers if self.scope == "per_layer_per_head" else 1

    @property
    def plan_heads(self) -> int:
        """Hp: 1 if all heads share a plan."""
        return 1 if self.scope == "union" else self.kv_heads


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"no GPU kernel can be built: {message}")
