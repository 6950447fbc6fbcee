"""Learning of gates and head shares on a tapped graph, in three phases that may stop and go on between two texts.

1. contexts: each is read and repeated; the attention that the repetition pays to its keys makes the gates' labels.
2. contexts that were held out: how well the gates foretell theirs.
3. texts: how many rows each head wins where all compete (see head_shares).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keysieve.compiler import gate_sums, head_shares, statistics_file
from keysieve.compiler.interrupts import interrupt_deferred
from keysieve.compiler.learning_texts import LEAST_CONTEXT, LearningTexts
from keysieve.compiler.pipeline import Matched
from keysieve.compiler.progress import Progress
from keysieve.compiler.run_nodes import Hear
from keysieve.compiler.statistics import Learned, Statistics
from keysieve.compiler.workers import Workers
from keysieve.passes.find_inputs import inputs_or_misses
from keysieve.passes.result import RopeAttention

SAVE_EVERY = 16  # contexts or texts
PHASES = ("contexts", "held-out contexts", "texts")

Sums = dict[int, dict[str, np.ndarray]]
"""layer -> name -> sum"""
Stream = Callable[[list[Tensor], Hear, Callable[[float], None]], None]
"""Run batches of input_ids [B,S] through the tapped graph (see layerwise.LayerByLayer.stream)."""


def learn_gates(
    measured: Statistics,
    matched: Matched,
    stream: Stream,
    texts: Callable[[], LearningTexts],
    output: Path,
    workers: Workers,
    progress: Progress,
    items_each: int,
) -> Statistics:
    """The statistics with gates and shares as measured.learned plans them, which are then in `output`, too.

    An interrupt keeps in `output` what is learned; of several processes, what they saved together last. Without any
    layer that could have a gate, the statistics stay as measured, and the progress says why.
    """
    names = list(matched.graph.outputs)
    with progress.stage("gates") as stage:
        gated = sum(name.startswith("hidden_") for name in names)
        if not gated:
            (miss, *_) = inputs_or_misses(matched.graph, [rope.attention for rope in matched.ropes]).misses
            stage.note(f"none: {miss}")
            return replace(measured, learned=None)
        learner = Learner(stream, names, matched.ropes, texts(), measured, workers, items_each)

        def save() -> None:
            snapshot = learner.snapshot()
            workers.on_first(lambda: statistics_file.save(snapshot, output))

        try:
            with progress.bar() as report:
                result = learner.run(save, report)
        except KeyboardInterrupt:
            if workers.count == 1:
                save()
            raise
        save()
        fits = [float(entry.gate_fit.mean()) for entry in result.layers if entry.gate_fit is not None]
        shares = "" if learner.learned.budgets else f"; no shares, for which {LEAST_CONTEXT:,} tokens are needed"
        stage.note(f"{gated} of {len(result.layers)} layers, r {np.mean(fits):.2f} on contexts held out{shares}")
    return result


class Learner:
    """One process's part in learning, on top of statistics whose queries are measured."""

    def __init__(
        self,
        stream: Stream,
        outputs: list[str],
        matches: list[RopeAttention],
        texts: LearningTexts,
        statistics: Statistics,
        workers: Workers,
        items_each: int = 1,
    ) -> None:
        """outputs: the tapped graph's, by name; items_each: contexts or texts that a process takes in one pass.

        statistics.learned says what is planned, and what is behind us.
        """
        if statistics.learned is None:
            raise ValueError("statistics.learned is None: nothing is planned")
        self.learned: Learned = replace(statistics.learned, sums={})
        self._stream, self._texts, self._workers, self._items_each = stream, texts, workers, items_each
        self._statistics = statistics
        self._attentions = {match.attention.layer: match.attention for match in matches}
        self._forms = {match.attention.layer: match.form for match in matches}
        self._outputs = [(kind, int(layer)) for kind, _, layer in (name.rpartition("_") for name in outputs)]
        self._gated = [layer for kind, layer in self._outputs if kind == "hidden"]
        self._layers = {entry.layer: entry for entry in statistics.layers}
        self._sums: Sums = statistics.learned.sums if workers.first else {}

    def run(self, save: Callable[[], None], report: Callable[[str, int, int], None]) -> Statistics:
        """Learn from all that is not yet behind us.

        `save` is called by every process, at the same places, when there is something new to keep.
        """
        learned = self.learned
        ends = np.cumsum([learned.contexts, learned.held_out, learned.texts]).tolist()
        items = [*self._texts.contexts, *self._texts.texts]
        unsaved = 0
        for phase, end in enumerate(ends):
            while learned.done < end:
                part = items[learned.done : min(end, learned.done + self._items_each * self._workers.count)]
                new = self._part(phase, part, report)
                with interrupt_deferred():
                    _add(self._sums, new)
                    learned.done += len(part)
                    unsaved += len(part)
                    if learned.done == end:
                        self._finish(phase)
                if unsaved >= SAVE_EVERY * self._workers.count:
                    save()
                    unsaved = 0
        return self.snapshot()

    def snapshot(self) -> Statistics:
        """The statistics with what was learned so far by all processes. To be called by all of them."""
        learned = replace(self.learned, sums=self._together())
        layers = [self._layers[entry.layer] for entry in self._statistics.layers]
        return replace(self._statistics, layers=layers, learned=learned)

    def _part(self, phase: int, part: list[list[int]], report: Callable[[str, int, int], None]) -> Sums:
        """This process's share of these contexts or texts."""
        mine = part[self._workers.rank :: self._workers.count]
        new: Sums = {}
        if not mine:
            return new
        shown = float(self.learned.done)

        def step(share: float) -> None:
            nonlocal shown
            shown += share * len(part)
            report(PHASES[phase], int(shown), self.learned.planned)

        values: list[dict[int, Tensor]] = [{} for _ in mine]
        waiting: list[dict[int, dict[str, Tensor]]] = [{} for _ in mine]

        def hear(item: int, output: int, value: Tensor) -> None:
            kind, layer = self._outputs[output]
            if layer not in self._gated or kind not in self._kinds(phase, layer):
                return
            parts = waiting[item].setdefault(layer, {})
            parts[kind] = value if kind == "sinks" else value[0]
            if len(parts) == len(self._kinds(phase, layer)):
                del waiting[item][layer]
                if phase < 2:
                    _add(new, {layer: self._of_context(phase, layer, parts)})
                else:
                    values[item][layer] = self._of_text(layer, parts)

        self._stream([torch.tensor([ids]) for ids in mine], hear, step)
        for of_text in filter(None, values):
            self._compete(of_text, new)
        return new

    def _kinds(self, phase: int, layer: int) -> set[str]:
        """The outputs of a layer that a phase reads."""
        if phase == 2:
            return {"query_pre", "hidden", "key"}
        return {"hidden", "query", "key"} | ({"sinks"} if self._attentions[layer].sinks is not None else set())

    def _of_context(self, phase: int, layer: int, parts: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Sums of one context's keys, without the first rows: those stay in any case, and are unlike all others."""
        attention, tokens = self._attentions[layer], self.learned.context_tokens
        labels = gate_sums.retention_labels(
            parts["query"],
            parts["key"],
            tokens,
            self._texts.repeats,
            attention.scale,
            attention.softcap,
            parts.get("sinks"),
        )
        rows = slice(head_shares.SINKS, tokens)
        if phase == 0:
            return gate_sums.regression_sums(parts["hidden"][rows], labels[rows])
        return gate_sums.fit_sums(self._gate(layer, parts["hidden"][rows]), labels[rows])

    def _of_text(self, layer: int, parts: dict[str, Tensor]) -> Tensor:
        scores = head_shares.trig_scores(parts["query_pre"], parts["key"], self._forms[layer])
        return head_shares.row_values(self._gate(layer, parts["hidden"]), scores)

    def _gate(self, layer: int, hidden: Tensor) -> Tensor:
        entry = self._layers[layer]
        if entry.gate_weight is None or entry.gate_bias is None:
            raise ValueError(f"layer {layer} has no gate yet")
        return gate_sums.gate(hidden, entry.gate_weight, entry.gate_bias)

    def _compete(self, values: dict[int, Tensor], new: Sums) -> None:
        layers = sorted(values)
        by_budget = [head_shares.rows_held([values[at] for at in layers], budget) for budget in self.learned.budgets]
        for index, layer in enumerate(layers):
            _add(new, {layer: {"held": np.stack([held[index] for held in by_budget])}})

    def _finish(self, phase: int) -> None:
        """Turn the sums of all processes into gates, their fit or shares."""
        sums = self._together()
        for layer in self._gated:
            self._layers[layer] = replace(self._layers[layer], **self._result(phase, layer, sums.get(layer, {})))
        self._sums = {}

    def _result(self, phase: int, layer: int, sums: dict[str, np.ndarray]) -> dict[str, Any]:
        if phase == 0:
            weight, bias = gate_sums.solve(sums, layer)
            return {"gate_weight": weight, "gate_bias": bias}
        if phase == 1:
            return {"gate_fit": gate_sums.correlation(sums)}
        budgets = np.array(self.learned.budgets)[:, None]
        return {"share": (sums["held"] / self.learned.texts / budgets).astype(np.float32)}

    def _together(self) -> Sums:
        """The sums of all processes."""
        if self._workers.count == 1:
            return {layer: dict(sums) for layer, sums in self._sums.items()}
        shapes: dict[tuple[int, str], tuple[int, ...]] = {}
        mine = {(layer, name): array.shape for layer, sums in self._sums.items() for name, array in sums.items()}
        for theirs in self._workers.gather(mine):
            shapes |= theirs
        total: Sums = {}
        for (layer, name), shape in sorted(shapes.items()):
            array = self._sums.get(layer, {}).get(name)
            total.setdefault(layer, {})[name] = self._workers.sum(np.zeros(shape) if array is None else array)
        return total


def _add(total: Sums, new: Sums) -> None:
    """Add sums in place."""
    for layer, sums in new.items():
        for name, array in sums.items():
            known = total.setdefault(layer, {})
            if name in known:
                known[name] += array
            else:
                known[name] = array.copy()
