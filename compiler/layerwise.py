"""A tapped graph run layer by layer: only the weights of one layer, and the activations between two, are in memory."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.run_nodes import Hear, last_uses, run_nodes, taps_of
from keysieve.compiler.weights import Checkpoint
from keysieve.passes.graph import Graph
from keysieve.passes.result import RopeAttention

DECODER = "model."  # how capture's wrapper calls the model


class LayerByLayer:
    """Runs the tapped graph of a model without weights over batches, reading each layer's weights as it comes.

    A layer here is what lies between two places where the graph is at its narrowest, so attention and the part behind
    it count as two. All batches of a call pass through one layer before the next layer is read: a call costs one
    reading of the checkpoint, and holds one narrow place's activations for each of its batches.
    alive, peak: bytes of weights held now, and at most so far.
    """

    def __init__(self, graph: Graph, matches: list[RopeAttention], checkpoint: Checkpoint):
        self.alive = self.peak = 0
        self._graph = graph
        self._checkpoint = checkpoint
        self._forms = [(m.form, m.attention.query_heads, m.attention.layer) for m in matches]
        if not graph.closed:
            graph.program()
        self._weights: dict[Node, str] = {}  # parameter -> its name in the model
        self._constants: dict[Node, torch.Tensor] = {}
        for node, spec in graph.specs.items():
            name = (spec.target or "").removeprefix(DECODER)
            if spec.kind is InputKind.PARAMETER:
                self._weights[node] = name
            elif spec.kind is InputKind.BUFFER and spec.persistent:
                self._constants[node] = checkpoint.read(name)
            else:
                self._constants[node] = graph.tensors[node]
        self._last_use = last_uses(graph)
        self._taps = taps_of(graph)
        self.layers = self._split()

    @torch.no_grad()
    def run(self, batches: list[torch.Tensor], step: Callable[[float], None]) -> list[QueryMoments]:
        """The query sums of every layer over batches of input_ids [B,S]; `step` hears which share is done."""
        moments = [QueryMoments(*form) for form in self._forms]

        def hear(_: int, output: int, value: torch.Tensor) -> None:
            if output < len(moments):
                moments[output].add(value)

        self.stream(batches, hear, step)
        return moments

    @torch.no_grad()
    def stream(self, batches: list[torch.Tensor], hear: Hear, step: Callable[[float], None]) -> None:
        """Run batches of input_ids [B,S], and tell `hear` each output of each batch once, as soon as it is there."""
        carried = [self._given(batch) for batch in batches]
        for layer in self.layers:
            weights = self._read(layer)
            for batch, values in enumerate(carried):
                self._run_layer(layer, weights, values, partial(hear, batch))
                step(1 / (len(self.layers) * len(batches)))
            self.alive -= sum(tensor.nbytes for tensor in weights.values())
            del weights

    def _given(self, input_ids: torch.Tensor) -> dict[Node, Any]:
        inputs = self._graph.inputs
        position_ids = torch.arange(input_ids.shape[1]).expand(*input_ids.shape)
        given = {"input_ids": input_ids, "position_ids": position_ids}
        return {node: given[name] for name, node in inputs.items() if name in given}

    def _read(self, layer: list[Node]) -> dict[Node, torch.Tensor]:
        used = dict.fromkeys(i for node in layer for i in node.all_input_nodes if i in self._weights)
        weights = {}
        for node in used:
            weights[node] = self._checkpoint.read(self._weights[node])
            self.alive += weights[node].nbytes
            self.peak = max(self.peak, self.alive)
        return weights

    def _run_layer(
        self,
        layer: list[Node],
        weights: dict[Node, torch.Tensor],
        values: dict[Node, Any],
        hear: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Run one layer on one batch, whose `values` become those that later layers need."""
        kept = {**self._constants, **weights, **values}
        values.clear()
        run_nodes(self._graph, layer, kept, self._last_use, self._taps, hear)
        values.update({n: kept[n] for n in kept if n not in self._constants and n not in weights})

    def _split(self) -> list[list[Node]]:
        """The calls of the graph, cut wherever no more is alive than at the narrowest place between two taps."""
        calls = [n for n in self._graph.fx.nodes if n.op not in ("placeholder", "output")]
        place = {node: index for index, node in enumerate(calls)}
        alive, widths = 0, []
        for node in calls:
            alive += _bytes(node) if self._last_use[node] is not node else 0
            dying = {i for i in node.all_input_nodes if i in place and self._last_use[i] is node}
            alive -= sum(_bytes(i) for i in dying)
            widths.append(alive)
        queries = self._graph.output_node.args[0][: len(self._forms)]
        places = {place[query] for query in queries}
        between = [min(widths[a:b]) for a, b in pairwise(sorted(places))]
        narrow = max(between, default=-1)
        layers: list[list[Node]] = [[]]
        for node, width in zip(calls, widths, strict=True):
            layers[-1].append(node)
            if width <= narrow and any(i in self._weights for n in layers[-1] for i in n.all_input_nodes):
                layers.append([])
        return [layer for layer in layers if layer]


def _bytes(node: Node) -> int:
    """What the node's value takes, at the sizes with which the graph was captured."""
    values = node.meta.get("val")
    total = 0
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor):
            total += prod(size if isinstance(size, int) else size.node.hint for size in value.shape) * value.itemsize
    return total
