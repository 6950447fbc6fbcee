"""Calibration: one pass over text through the tapped graph, summing every head's pre-RoPE queries.

`torchrun --nproc-per-node N -m keysieve.compiler.calibrate MODEL -o FILE ...` lets N processes share the work.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from keysieve.compiler import official_statistics, statistics_file
from keysieve.compiler.config import CALIBRATION_TOKENS
from keysieve.compiler.interrupts import interrupt_deferred
from keysieve.compiler.layerwise import LayerByLayer
from keysieve.compiler.learn import learn_gates
from keysieve.compiler.learning_texts import CONTEXT, check_learning, learning_texts, plan_learning
from keysieve.compiler.model import identity, load_model, load_skeleton, load_tokenizer
from keysieve.compiler.pipeline import Matched, find, model_sizes, tap_graph
from keysieve.compiler.progress import Progress
from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.run_nodes import Hear, last_uses, run_nodes, taps_of
from keysieve.compiler.statistics import Identity, LayerStatistics, Statistics, check_matches
from keysieve.compiler.statistics_report import statistics_report
from keysieve.compiler.text import FIELD, Rows, count_tokens, text_sha256, text_source, token_chunks
from keysieve.compiler.weights import Checkpoint, too_large
from keysieve.compiler.workers import Workers
from keysieve.errors import ConfigError, StatisticsError
from keysieve.passes.graph import Graph
from keysieve.passes.result import RopeAttention

CHUNK = 1024  # tokens of one sequence
SAVE_EVERY = 16  # chunks
PASS = 16  # chunks for which the weights are read once, where they are read layer by layer

Item = TypeVar("Item")
Step = Callable[[float], None]


def calibrate(
    model: str | Path,
    output: Path | str,
    texts: Sequence[Path] | None = None,
    max_tokens: int = CALIBRATION_TOKENS,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    *,
    dataset: Rows | None = None,
    text_field: str = FIELD,
    batch_size: int = 1,
    layer_by_layer: bool | None = None,
    gates: bool = True,
    context: int | None = None,
) -> Statistics:
    """Measure E[q_f] and E|q_f| of every layer and query head on text, and write the statistics file `output`.

    gates: learn a gate for every KV head and the heads' shares of the budget, too (see Learned), on the same text and
    synthetic facts; context: tokens of the texts by which shares are learned, which should be as long as those that
    are served (default 4096, or what text and model allow). Layers whose queries, keys and values have no common input
    get neither, nor does a .pt file. Gates take d * d * 16 bytes a layer while they are learned, d the hidden size.

    texts: files, as iter_texts reads them; dataset: instead of files a datasets.Dataset, a list, or any object that
    can be iterated again and again, of strings or of dicts with a string in `text_field`; neither: Python's own
    reference topics. Every `chunk` tokens are a sequence of their own, and batch_size of them one forward pass.
    layer_by_layer: read the weights from safetensors files one layer at a time, so that models larger than memory can
    be calibrated; None: where they do not fit.

    Memory for texts stays constant. An interrupted run (Ctrl-C) keeps what is done in `output`, and the same call goes
    on from there; a finished file of the same model and text is left as it is. An output that ends in .pt is written
    in the official TriAttention format, which cannot be resumed or replaced. Inside a torch.distributed group all
    processes make the same call: each takes its share of the batches, and the first one reads and writes `output`.
    Warns where the statistics say that the method does not fit the model (see StatisticsReport). Raises StatisticsError
    where `output` holds statistics of something else, ConfigError for bad text or options, CaptureError for a model
    that cannot be loaded, or not layer by layer.
    """
    workers = Workers()
    progress = (progress or Progress()) if workers.first else Progress(quiet=True)
    output = Path(output)
    workers.on_first(lambda: _check_output(output))
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    start_texts = text_source(texts, dataset, text_field)
    text_hash = text_sha256(start_texts())
    workers.check_equal("text", text_hash)
    tokenizer = load_tokenizer(model)
    reason = _why_layer_by_layer(model, layer_by_layer, workers)
    layer_by_layer = bool(reason)
    with progress.stage("load") as stage:
        if reason:
            stage.note(f"layer by layer, {reason}")
        loaded = load_skeleton(model) if layer_by_layer else load_model(model)
        checkpoint = Checkpoint(model, loaded) if layer_by_layer else None
        model_identity = identity(loaded, checkpoint.parameters() if checkpoint else None)
    workers.check_equal("model", model_identity)
    limit = getattr(loaded.config, "max_position_embeddings", None) or max(chunk, 2 * CONTEXT)
    chunk = min(chunk, limit)
    matched = find(loaded, progress)
    matched.require_all()
    model_identity |= model_sizes(matched)
    resumed = workers.on_first(lambda: _resume(output, model_identity, matched, text_hash, max_tokens, chunk, context))
    done = resumed.tokens if resumed else 0
    measured = resumed and (done >= max_tokens or (done == resumed.tokens_planned < max_tokens and done % chunk))
    gates = gates and output.suffix != ".pt"
    known = bool(gates and resumed and resumed.learned and resumed.learned.finished)
    gates = gates and not known
    if gates:
        check_learning(tokenizer, limit, context)
    if resumed and measured and not gates:
        return _warned(resumed, workers)
    graph = tap_graph(matched, learn=True) if gates else tap_graph(matched)
    passes = LayerByLayer(graph, matched.ropes, checkpoint) if checkpoint else _InMemory(graph, matched.ropes)
    total = count_tokens(start_texts(), tokenizer, max_tokens)
    if resumed and measured:
        result = resumed
    else:
        start = resumed or Statistics([], 0, max_tokens, text_hash, model_identity, chunk)
        start.tokens_planned = max_tokens
        with progress.stage("calibrate") as stage:
            chunks = token_chunks(start_texts(), tokenizer, chunk, max_tokens)
            measurement = _Measurement(passes, start, matched.ropes, total, batch_size, output, workers)
            result = measurement.run(chunks, progress)
            stage.note(f"{result.tokens:,} tokens" + (f", {done:,} of them before" if done else ""))
        workers.on_first(lambda: _save(result, output))
    if known:
        with progress.stage("gates") as stage:
            stage.note(f"kept as learned before; remove {output} to learn them from the longer text")
    if gates:
        plan = result.learned or plan_learning(tokenizer, total, limit, context)
        gather = partial(learning_texts, start_texts, tokenizer, total, plan)
        each = PASS if checkpoint else 1
        result = learn_gates(
            replace(result, learned=plan), matched, passes.stream, gather, output, workers, progress, each
        )
    return _warned(result, workers)


def _check_output(output: Path) -> None:
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"the folder of output {output} does not exist; create it or choose another name")
    if output.suffix == ".pt" and output.exists():
        raise StatisticsError(f"output {output} exists already; remove it or choose another name")


def _why_layer_by_layer(model: str | Path, wanted: bool | None, workers: Workers) -> str:
    """Why the weights are read layer by layer: asked for, or too large for one of the machines; "" if they are not."""
    if wanted is not None:
        return "as asked" if wanted else ""
    return next(filter(None, workers.gather(too_large(model, workers.on_this_machine()))), "")


def _warned(result: Statistics, workers: Workers) -> Statistics:
    """The result, after a warning where it says that the method does not fit."""
    doubt = statistics_report(result).doubt
    if doubt and workers.first:
        warnings.warn(doubt, stacklevel=3)
    return result


class _InMemory:
    """The tapped graph of a model that is loaded whole, one batch a call."""

    def __init__(self, graph: Graph, ropes: list[RopeAttention]) -> None:
        self._graph = graph
        self._ropes = ropes

    def run(self, batches: list[torch.Tensor], step: Step) -> list[QueryMoments]:
        moments = _moments(self._ropes)
        for batch in batches:
            run_graph(self._graph, batch, partial(_add_tap, moments))
            step(1 / len(batches))
        return moments

    def stream(self, batches: list[torch.Tensor], hear: Hear, step: Step) -> None:
        """As LayerByLayer.stream, one batch after the other."""
        for number, batch in enumerate(batches):
            run_graph(self._graph, batch, partial(hear, number))
            step(1 / len(batches))


class _Measurement:
    """The sums of one process, how they grow over the text, and the snapshots of all processes' sums together.

    The text goes in rounds: a round gives each process as many batches as it takes in one pass. Which chunks make a
    batch does not depend on the number of processes.
    """

    def __init__(
        self,
        passes: LayerByLayer | _InMemory,
        start: Statistics,
        ropes: list[RopeAttention],
        total: int,
        batch_size: int,
        output: Path,
        workers: Workers,
    ) -> None:
        self.passes = passes
        self.start = start
        self.total = total  # tokens
        self.batch_size = batch_size
        self.output = output
        self.workers = workers
        self.tokens = start.tokens  # of all processes, in whole rounds
        self.ropes = ropes
        self.moments = _moments(ropes)
        self.first_half: list[QueryMoments] = []  # the moments in the middle of the text
        self.half = -(-total // start.chunk) // 2 * start.chunk
        if workers.first and start.layers:
            self.moments = [QueryMoments.resume(layer, start.tokens) for layer in start.layers]
        self._resume_first_half()

    def run(self, chunks: Iterator[list[int]], progress: Progress) -> Statistics:
        """Measure all chunks that are not yet done."""
        done, unsaved = self.tokens // self.start.chunk, 0
        chunks = islice(chunks, done, None)
        batches_each = max(1, PASS // self.batch_size) if isinstance(self.passes, LayerByLayer) else 1
        before_half = islice(chunks, max(0, self.half // self.start.chunk - done))
        try:
            with progress.bar() as report:
                for part in (before_half, chunks):
                    for batches in _groups(_batches(part, self.batch_size), batches_each * self.workers.count):
                        self._round(batches, report)
                        unsaved += sum(len(batch) for batch in batches)
                        if unsaved >= SAVE_EVERY * self.workers.count and self._keeps:
                            self._save_snapshot()
                            unsaved = 0
                    if not self.first_half and 0 < self.tokens == self.half:
                        self.first_half = deepcopy(self.moments)
        except KeyboardInterrupt:
            # Peers may stand anywhere, so only what they saved together is kept.
            if self.workers.count == 1 and self.tokens > self.start.tokens and self._keeps:
                self._save_snapshot()
            raise
        return self.snapshot()

    def snapshot(self) -> Statistics:
        """The statistics of what all processes did so far. To be called by all of them."""
        layers, _ = self._together(self.moments)
        if self.start.layers:
            layers = [_with_learned(*both) for both in zip(layers, self.start.layers, strict=True)]
        first_half, first_tokens = self._together(self.first_half)
        return replace(self.start, layers=layers, tokens=self.tokens, first_half=first_half, first_tokens=first_tokens)

    @property
    def _keeps(self) -> bool:
        return self.output.suffix != ".pt"

    def _save_snapshot(self) -> None:
        snapshot = self.snapshot()
        self.workers.on_first(lambda: statistics_file.save(snapshot, self.output))

    def _round(self, batches: list[torch.Tensor], report: Callable[[str, int, int], None]) -> None:
        mine = batches[self.workers.rank :: self.workers.count]
        tokens, shown = sum(batch.numel() for batch in batches), float(self.tokens)

        def step(share: float) -> None:
            nonlocal shown
            shown += share * tokens
            report("tokens", round(shown), self.total)

        sums = self.passes.run(mine, step) if mine else []
        # An interrupt must not leave some layers a chunk ahead of others.
        with interrupt_deferred():
            for moment, new in zip(self.moments, sums, strict=False):
                moment.merge(new)
            self.tokens += tokens

    def _together(self, moments: list[QueryMoments]) -> tuple[list[LayerStatistics], int]:
        """The statistics over all processes' sums, and how many tokens these are."""
        layers, tokens = [], 0
        for moment in moments:
            whole = deepcopy(moment)
            whole.q_sum, whole.abs_sum = self.workers.sum(moment.q_sum), self.workers.sum(moment.abs_sum)
            whole.tokens = tokens = int(self.workers.sum(np.array([float(moment.tokens)]))[0])
            layers.append(whole.finish())
        return layers, tokens

    def _resume_first_half(self) -> None:
        """Take over the first half of an earlier run, or all of it, if the middle of the text is already behind us."""
        start = self.start
        if start.tokens <= self.half:
            return
        known = start.first_tokens
        if known and abs(known - self.half) <= abs(start.tokens - self.half):
            layers, tokens = start.first_half, known
        else:
            layers, tokens = start.layers, start.tokens
        self.first_half = _moments(self.ropes)
        if self.workers.first:
            self.first_half = [QueryMoments.resume(layer, tokens) for layer in layers]


def _with_learned(new: LayerStatistics, old: LayerStatistics) -> LayerStatistics:
    return replace(new, **{name: getattr(old, name) for name in statistics_file.LEARNED})


def _add_tap(moments: list[QueryMoments], output: int, tap: torch.Tensor) -> None:
    """The queries come first among the outputs, and the moments ask for no others."""
    if output < len(moments):
        moments[output].add(tap)


def _moments(ropes: list[RopeAttention]) -> list[QueryMoments]:
    return [QueryMoments(rope.form, rope.attention.query_heads, rope.attention.layer) for rope in ropes]


def _batches(chunks: Iterable[list[int]], size: int) -> Iterator[torch.Tensor]:
    """Chunks stacked to [size, chunk]; a shorter last one is a batch of its own."""
    waiting: list[list[int]] = []
    for ids in chunks:
        if waiting and (len(waiting) == size or len(ids) != len(waiting[0])):
            yield torch.tensor(waiting)
            waiting = []
        waiting.append(ids)
    if waiting:
        yield torch.tensor(waiting)


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


@torch.no_grad()
def run_graph(graph: Graph, input_ids: torch.Tensor, hear: Callable[[int, torch.Tensor], None]) -> None:
    """Run a captured graph on input_ids [B,S] with positions from 0, and tell hear(number, value) every output."""
    if not graph.closed:
        graph.program()
    position_ids = torch.arange(input_ids.shape[1]).expand(*input_ids.shape)
    given = {"input_ids": input_ids, "position_ids": position_ids}
    env = dict(graph.tensors) | {node: given[name] for name, node in graph.inputs.items() if name in given}
    nodes = [node for node in graph.fx.nodes if node.op not in ("placeholder", "output")]
    run_nodes(graph, nodes, env, last_uses(graph), taps_of(graph), hear)


def _resume(
    output: Path, model: Identity, matched: Matched, text_hash: str, max_tokens: int, chunk: int, context: int | None
) -> Statistics | None:
    """What an earlier, interrupted or shorter run left in `output`."""
    if not output.exists():
        return None
    found = statistics_file.load(output)
    check_matches(found, model, [rope.form for rope in matched.ropes])
    if found.text_sha256 != text_hash:
        raise StatisticsError(f"{output} holds statistics of another text; remove it, or choose another output")
    if found.chunk != chunk:
        raise StatisticsError(
            f"{output} was measured in chunks of {found.chunk} tokens, which {chunk} cannot continue; "
            "use the same chunk, or remove it"
        )
    if found.learned and context and found.learned.share_context != context:
        raise StatisticsError(
            f"{output} has shares of texts of {found.learned.share_context:,} tokens, not {context:,}; remove it, or "
            "choose another output"
        )
    if found.tokens < found.tokens_planned and found.tokens % chunk:
        return replace(found, tokens_planned=found.tokens)  # an earlier run used the whole text
    if found.tokens % chunk and found.tokens < max_tokens:
        raise StatisticsError(
            f"{output} was finished with {found.tokens:,} tokens, which is no multiple of {chunk}, so it cannot be "
            "continued; remove it to calibrate on more"
        )
    return found


def _save(result: Statistics, output: Path) -> None:
    if not result.tokens:
        raise ConfigError("the text holds no tokens; give a longer one")
    writer = official_statistics.save_official if output.suffix == ".pt" else statistics_file.save
    writer(result, output)


if __name__ == "__main__":
    from keysieve.compiler.cli import main

    sys.exit(main(["calibrate", *sys.argv[1:]]))
