"""The one description of the three plugin nodes: torch ops, ONNX functions and native plugins follow it.

Shapes: B batch, S new tokens, C capacity (rows allocated), L layers, Hq/Hkv heads, D head dim, R rotary dim,
J offset rows (1 for the mean over offsets), Lp = 1 or L and Hp = 1 or Hkv (a plan shared by layers or heads).
"""

from dataclasses import dataclass
from typing import Any

DOMAIN = "trt.plugins"
NAMESPACE = ""


@dataclass(frozen=True)
class Port:
    """One input or output: its shape, dtype ("cache" is the model's dtype) and, for an output, what it aliases.

    variadic: there may be several; optional: it may be left out. Both only at the end.
    """

    name: str
    shape: str
    dtype: str
    alias: str | None = None
    variadic: bool = False
    optional: bool = False


@dataclass(frozen=True)
class PluginNode:
    """One node of the contract. Changing inputs, attributes or meaning raises the version."""

    name: str
    version: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: dict[str, type]

    @property
    def required(self) -> tuple[Port, ...]:
        """The inputs that no node leaves out."""
        return tuple(port for port in self.inputs if not port.optional)


UPDATE = PluginNode(
    "KeySieveUpdate",
    "1",
    inputs=(
        Port("key_new", "B,Hkv,S,D", "cache"),
        Port("value_new", "B,Hkv,S,Dv", "cache"),
        Port("length", "B", "int32"),
        Port("plan", "Lp,B,Hp,C", "int32"),
        Port("keep", "B", "int32"),
        Port("key", "B,Hkv,C,D", "cache"),
        Port("value", "B,Hkv,C,Dv", "cache"),
    ),
    outputs=(
        Port("key_out", "B,Hkv,C,D", "cache", alias="key"),
        Port("value_out", "B,Hkv,C,Dv", "cache", alias="value"),
    ),
    attributes={"layer": int},
)

SCORE = PluginNode(
    "KeySieveScore",
    "1",
    inputs=(
        Port("length", "B", "int32"),
        Port("limit", "B", "int32"),
        Port("position", "B", "int64"),
        Port("centre", "L,B,Hq,J,D", "float32"),
        Port("weight", "L,B,Hq,R/2", "float32"),
        Port("key", "B,Hkv,C,D", "cache", variadic=True),
    ),
    outputs=(Port("scores", "L,B,Hq,C", "float32"),),
    attributes={"policy": str, "query_heads": int, "rotary_dim": int, "interleaved": int},
)

SELECT = PluginNode(
    "KeySieveSelect",
    "2",
    inputs=(
        Port("scores", "L,B,Hq,C", "float32"),
        Port("length", "B", "int32"),
        Port("limit", "B", "int32"),
        Port("budget", "B", "int32"),
        Port("pinned", "B", "int32"),
        Port("utility", "L*B,Hkv,C,1", "float32", optional=True),
    ),
    outputs=(
        Port("plan", "Lp,B,Hp,C", "int32"),
        Port("keep", "B", "int32"),
        Port("evicted", "B", "int32"),
    ),
    attributes={"scope": str, "kv_heads": int, "sinks": int, "recent": int},
)

NODES = (UPDATE, SCORE, SELECT)

# What an engine with gates keeps of every row: how much attention the gate foretells, and the token's position.
# They are "keys" and "values" of one number in a cache of their own, one for each plan.
ROW_STATES = ("utility", "token")

# Update, RoPE and attention in one node, for ONNX Runtime's library alone: model.onnx never holds it. cosine and sine
# are left out where query and key come rotated; window and softcap are 0 for none. New tokens come first in shapes.
# Where the cache is for some KV heads of a layer, `heads` names them ("0,2", else ""), query, key_new and value_new are
# those of all its kv_heads, and Hq and Hkv elsewhere count the cache's own.
ATTEND = PluginNode(
    "KeySieveAttend",
    "2",
    inputs=(
        Port("query", "B,S,Hq,D", "float32"),
        Port("key_new", "B,S,Hkv,D", "float32"),
        Port("value_new", "B,S,Hkv,Dv", "float32"),
        *UPDATE.inputs[2:],
        Port("cosine", "B,S,D", "float32"),
        Port("sine", "B,S,D", "float32"),
        Port("sinks", "Hq", "float32"),
    ),
    outputs=(
        Port("read", "B,S,Hq,Dv", "float32"),
        *UPDATE.outputs,
    ),
    attributes={"layer": int, "scale": float, "softcap": float, "window": int, "kv_heads": int, "heads": str},
)

# What stands around a product and may be left out.
AROUND = (Port("norm", "K", "float32"), Port("residual", "...,N", "float32"))

# A product with the integers that export.quantize makes, for the same library alone, which reads them where they lie in
# the file. blocks is K/32 rounded up; weight may be a reshape that keeps N; x may be B,S,H,D with heads that make
# up K. Where gated is 1, x has 2K, and silu(first half) * second half is multiplied; where norm is given, it is
# x / sqrt(mean of squares + epsilon) * norm. residual is added where it is given.
LINEAR = PluginNode(
    "KeySieveLinear",
    "2",
    inputs=(
        Port("x", "...,K", "float32"),
        Port("weight", "N,blocks,4*bits", "uint8"),
        Port("scale", "N,blocks", "float32"),
        Port("zero", "N,bytes", "uint8"),
        *AROUND,
    ),
    outputs=(Port("y", "...,N", "float32"),),
    attributes={"N": int, "K": int, "bits": int, "gated": int, "epsilon": float},
)

# The same with float weights as they lie in the file.
MATMUL = PluginNode(
    "KeySieveMatMul",
    "2",
    inputs=(Port("x", "...,K", "float32"), Port("weight", "N,K", "float32"), *AROUND),
    outputs=(Port("y", "...,N", "float32"),),
    attributes={"epsilon": float},
)

# What linear attention needs in an ONNX file. No plugin carries it: the function body runs everywhere.
LINEAR_ATTENTION = PluginNode(
    "KeySieveLinearAttention",
    "1",
    inputs=(
        Port("query", "B,H,S,Dk", "float32"),
        Port("key", "B,H,S,Dk", "float32"),
        Port("value", "B,H,S,Dv", "float32"),
        Port("decay", "B,H,S", "float32"),
        Port("rate", "B,H,S", "float32"),
        Port("state", "B,H,Dk,Dv", "float32"),
    ),
    outputs=(Port("read", "B,H,S,Dv", "float32"), Port("state_out", "B,H,Dk,Dv", "float32")),
    attributes={"delta": int},
)


def plan_shape(scope: str, layers: Any, batch: Any, kv_heads: Any, capacity: Any) -> tuple[Any, Any, Any, Any]:
    """Shape [Lp, B, Hp, C] of a plan in that scope."""
    shared_layers, shared_heads = scope != "per_layer_per_head", scope == "union"
    return (1 if shared_layers else layers, batch, 1 if shared_heads else kv_heads, capacity)
