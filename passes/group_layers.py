"""group_layers: which layers that evict share a plan, a score node and a select node."""

from dataclasses import dataclass

from keysieve.passes.result import RopeAttention


@dataclass(frozen=True)
class Group:
    """Layers that evict and have one shape: query heads, KV heads, head dim and rotary dim.

    suffix ends the names of the inputs and outputs that are the group's own (plan, centre, magnitude): "" where all
    layers have one shape, else _0, _1 and so on.
    """

    matches: list[RopeAttention]
    suffix: str = ""

    @property
    def query_heads(self) -> int:
        return self.matches[0].attention.query_heads

    @property
    def kv_heads(self) -> int:
        return self.matches[0].attention.kv_heads

    @property
    def head_dim(self) -> int:
        return self.matches[0].attention.head_dim


def group_layers(matches: list[RopeAttention]) -> list[Group]:
    """The groups of a model, in the order of their first layers.

    A layer without RoPE has no rotary dim of its own: it joins the first group of its heads.
    """
    rotary_dims: dict[tuple[int, int, int], int] = {}
    for match in matches:
        if match.form.rotary_dim:
            rotary_dims.setdefault(_heads(match), match.form.rotary_dim)
    groups: dict[tuple[tuple[int, int, int], int], list[RopeAttention]] = {}
    for match in matches:
        heads = _heads(match)
        shape = heads, match.form.rotary_dim or rotary_dims.get(heads, 0)
        groups.setdefault(shape, []).append(match)
    several = len(groups) > 1
    return [Group(members, f"_{index}" if several else "") for index, members in enumerate(groups.values())]


def _heads(match: RopeAttention) -> tuple[int, int, int]:
    attention = match.attention
    return attention.query_heads, attention.kv_heads, attention.head_dim
