"""group_layers: which caches that evict share a plan, a score node and a select node."""

from dataclasses import dataclass

from keysieve.passes.result import RopeAttention


@dataclass(frozen=True)
class Group:
    """Layers, or parts of layers, that evict and have one shape: query heads, KV heads, head dim and rotary dim.

    suffix ends the names of the inputs and outputs that are the group's own (plan, centre, magnitude): "" where there
    is one group, else _0, _1 and so on. Of parts: head_class is their class, source the index of the group of their
    layers.
    """

    matches: list[RopeAttention]
    suffix: str = ""
    head_class: int = 0
    source: int = 0

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


def group_parts(layers: list[Group], parts: list[RopeAttention]) -> list[Group]:
    """The parts that split_heads made of the layers, as groups of one class and one shape.

    Where nothing was split, these are the groups of the layers.
    """
    sources = {match.attention.layer: index for index, group in enumerate(layers) for match in group.matches}
    found: dict[tuple[int, int, int], list[RopeAttention]] = {}
    for part in parts:
        attention = part.attention
        found.setdefault((sources[attention.layer], attention.head_class, attention.kv_heads), []).append(part)
    several = len(found) > 1
    return [
        Group(members, f"_{index}" if several else "", head_class, source)
        for index, ((source, head_class, _), members) in enumerate(sorted(found.items()))
    ]


def _heads(match: RopeAttention) -> tuple[int, int, int]:
    attention = match.attention
    return attention.query_heads, attention.kv_heads, attention.head_dim
