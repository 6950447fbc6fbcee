"""Captured graphs for the pass tests: tiny models, hand-made toy decoders, and a way to run an edited graph."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.compiler.pipeline import Matched, find
from keysieve.compiler.progress import Progress
from keysieve.passes.find_attention import find_attention
from keysieve.passes.gather_logits import gather_logits
from keysieve.passes.graph import Graph
from keysieve.passes.group_layers import Group, group_layers
from keysieve.passes.insert_cache import insert_cache
from keysieve.passes.insert_eviction import insert_eviction
from keysieve.passes.policies.stateless import stateless
from keysieve.passes.result import Attention, RopeAttention
from keysieve.passes.rope_form import RopeForm
from support.tiny_models import VOCABULARY, tiny_model

Rope = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""rope(query [B,Hq,S,D], key [B,Hkv,S,D], position_ids [B,S]) -> both, rotated."""


def match(name: str) -> Matched:
    """A fresh capture of that tiny model with what is found in it; the test may edit it."""
    return find(tiny_model(name), Progress(quiet=True))


@lru_cache
def matched(name: str) -> Matched:
    """The same, made once a session; the test must leave it as it is."""
    return match(name)


class ToyDecoder(nn.Module):
    """One attention layer with a rotation (or anything else) of the test's own, written in plain torch."""

    def __init__(
        self, rope: Rope, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, sinks: bool = False, **attention: float
    ):
        super().__init__()
        self.rope = rope
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.attention = {"window": 0, "chunk": 0, "softcap": 0.0} | attention
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.query = nn.Linear(16, heads * head_dim, bias=False)
        self.key = nn.Linear(16, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(16, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, VOCABULARY, bias=False)
        self.sinks = nn.Parameter(torch.randn(heads)) if sinks else None

    def mask(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """[B,1,S,S] bool, for tests of masks."""
        return None

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        query, key = self.rope(query, key, position_ids)
        window, chunk = int(self.attention["window"]), int(self.attention["chunk"])
        softcap = float(self.attention["softcap"])
        sinks, mask = self.sinks, self.mask(input_ids, position_ids)
        result = torch.ops.keysieve.attention(query, key, value, sinks, mask, 0.5, window, chunk, softcap, 0)
        return self.out(result.transpose(1, 2).flatten(2))


class SideBySide(nn.Module):
    """A layer without rotation for each of these numbers of KV heads; their logits are added."""

    def __init__(self, *kv_heads: int):
        super().__init__()
        self.layers = nn.ModuleList(ToyDecoder(lambda q, k, p: (q, k), kv_heads=heads) for heads in kv_heads)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return torch.stack([layer(input_ids, position_ids) for layer in self.layers]).sum(0)


def evicting(module: nn.Module, policy: str, scope: str) -> Graph:
    """The graph of a toy with cache and eviction, 2 sinks and 4 recent rows."""
    graph = graph_of(module)
    attentions = find_attention(graph).matches
    gather_logits(graph)
    groups = groups_of(attentions)
    cache = insert_cache(graph, attentions, groups, scope)
    insert_eviction(graph, cache, groups, [stateless(graph, policy)] * len(groups), scope, 2, 4)
    return graph


def graph_of(module: nn.Module) -> Graph:
    """Export forward(input_ids [B,S], position_ids [B,S]) -> logits with dynamic sizes, as capture does."""
    tokens, positions = torch.zeros(3, 5, dtype=torch.long), torch.arange(5).repeat(3, 1)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"input_ids": dynamic, "position_ids": dynamic}
    with torch.no_grad():
        return Graph(export(module.eval(), (tokens, positions), dynamic_shapes=shapes, strict=False))


def groups_of(attentions: list[Attention]) -> list[Group]:
    """Those that evict, by shape, as if none rotated: for passes that never ask how."""
    plain = [RopeForm("nope", attention.head_dim, 0, np.zeros(0)) for attention in attentions]
    nodes = [[attention.query] * 3 for attention in attentions]
    matches = zip(attentions, nodes, plain, strict=True)
    return group_layers([RopeAttention(found, *three, form) for found, three, form in matches if found.evicts])


@torch.no_grad()
def run(graph: Graph, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a graph eagerly in torch on inputs by name (those it lacks are left out); returns its outputs by name."""
    if not graph.closed:
        graph.program()
    placeholders = [node for node in graph.fx.nodes if node.op == "placeholder"]
    arguments = [graph.tensors[node] if node in graph.tensors else given[node.name] for node in placeholders]
    return dict(zip(graph.outputs, graph.module(*arguments), strict=True))
