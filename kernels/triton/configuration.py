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
MAX_REGISTERS = 128  # of a thread
# Products of matrices need more, and the attention runs one or two blocks a processor anyway.
ATTEND_REGISTERS = 255


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
        check_dims(self.dtype, head_dim=self.head_dim, value_dim=self.value_dim)
        check_scoring(self.query_heads, self.kv_heads, self.head_dim, self.rotary_dim, self.policy)
        check_scope(self.scope)

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


def check_dims(dtype: str, **dims: int) -> None:
    """Raise ConfigError unless the kernels can read rows of these widths and this dtype."""
    _check(dtype in DTYPES, f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    for name, size in dims.items():
        _check(
            0 < size <= MAX_HEAD_DIM and size % 8 == 0,
            f"{name} is {size}; the GPU kernels take multiples of 8 up to {MAX_HEAD_DIM}",
        )


def check_scoring(query_heads: int, kv_heads: int, head_dim: int, rotary_dim: int, policy: str) -> None:
    """Raise ConfigError unless the score kernel can be built for these."""
    _check(
        0 <= rotary_dim <= head_dim and rotary_dim % 2 == 0,
        f"rotary_dim is {rotary_dim}; it must be even and at most head_dim ({head_dim})",
    )
    check_heads(query_heads, kv_heads)
    _check(policy in POLICIES, f"policy is {policy!r}; choose one of {', '.join(POLICIES)}")


def check_heads(query_heads: int, kv_heads: int, most: int = MAX_GROUP) -> None:
    """Raise ConfigError unless every KV head has equally many query heads, 1 to `most`."""
    _check(
        query_heads % kv_heads == 0 and 1 <= query_heads // kv_heads <= most,
        f"{query_heads} query heads on {kv_heads} KV heads: the GPU kernels take 1 to {most} "
        "query heads for every KV head",
    )


def check_scope(scope: str) -> None:
    """Raise ConfigError for a scope that there is not."""
    _check(scope in SCOPES, f"scope is {scope!r}; choose one of {', '.join(SCOPES)}")


def needs_stats(scope: str) -> bool:
    """Whether a plan of this scope has heads of several KV heads, whose statistics are then a launch of their own."""
    return scope != "per_layer_per_head"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"no GPU kernel can be built: {message}")
