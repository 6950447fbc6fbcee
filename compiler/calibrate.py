"""Calibration: one pass over text through the tapped graph, summing every head's pre-RoPE queries."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from keysieve.compiler import statistics as statistics_file
from keysieve.compiler.model import identity, load_model, load_tokenizer
from keysieve.compiler.pipeline import Matched, find, model_sizes, tap_graph
from keysieve.compiler.progress import Progress
from keysieve.compiler.statistics import QueryMoments, Statistics
from keysieve.compiler.text import iter_texts, text_sha256, token_chunks
from keysieve.errors import ConfigError, StatisticsError
from keysieve.passes.graph import Graph

CHUNK = 1024  # tokens of one forward pass; every chunk is a sequence of its own
SAVE_EVERY = 16  # chunks


def calibrate(
    model: str | Path,
    output: Path | str,
    texts: Sequence[Path] | None = None,
    max_tokens: int = 65536,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Statistics:
    """Measure E[q_f] and E|q_f| of every layer and query head on text, and write the statistics file `output`.

    texts None: Python's own reference topics. Memory stays constant. An interrupted run (Ctrl-C) keeps what is done
    in `output`, and the same call goes on from there; a finished file of the same model and text is left as it is.
    An output that ends in .pt is written in the official TriAttention format, which cannot be resumed or replaced.
    Raises StatisticsError where `output` holds statistics of something else, ConfigError for bad text or options.
    """
    progress = progress or Progress()
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"the folder of output {output} does not exist; create it or choose another name")
    if output.suffix == ".pt" and output.exists():
        raise StatisticsError(f"output {output} exists already; remove it or choose another name")
    text_hash = text_sha256(iter_texts(texts))
    tokenizer = load_tokenizer(model)
    with progress.stage("load"):
        loaded = load_model(model)
    limit = getattr(loaded.config, "max_position_embeddings", None) or chunk
    chunk = min(chunk, limit)
    matched = find(loaded, progress)
    matched.require_all()
    model_identity = {**identity(loaded), **model_sizes(matched)}
    resumed = _resume(output, model_identity, matched, text_hash, max_tokens, chunk)
    done = resumed.tokens if resumed else 0
    if resumed and (done >= max_tokens or (done == resumed.tokens_planned < max_tokens and done % chunk)):
        return resumed
    chunks = token_chunks(iter_texts(texts), tokenizer, chunk, max_tokens)
    with progress.stage("calibrate") as stage:
        start = resumed or Statistics([], 0, max_tokens, text_hash, model_identity, chunk)
        start.tokens_planned = max_tokens
        result = _measure(matched, chunks, start, output, progress)
        stage.note(f"{result.tokens:,} tokens" + (f", {done:,} of them before" if done else ""))
    _save(result, output)
    return result


def _measure(
    matched: Matched,
    chunks: Iterator[list[int]],
    start: Statistics,
    output: Path,
    progress: Progress,
) -> Statistics:
    ropes = matched.ropes
    if start.layers:
        moments = [QueryMoments.resume(layer, start.tokens) for layer in start.layers]
    else:
        moments = [QueryMoments(r.form, r.attention.query_heads, r.attention.layer) for r in ropes]
    graph = tap_graph(matched)
    tokens = start.tokens

    def snapshot() -> Statistics:
        return replace(start, layers=[moment.finish() for moment in moments], tokens=tokens)

    todo = islice(chunks, tokens // start.chunk, None)
    try:
        for number, ids in enumerate(progress.track(todo, start.tokens_planned - tokens, "tokens", start.chunk), 1):
            taps = run_graph(graph, torch.tensor([ids]))
            # An interrupt must not leave some layers a chunk ahead of others.
            with _interrupt_deferred():
                for moment, tap in zip(moments, taps, strict=True):
                    moment.add(tap)
                tokens += len(ids)
            if number % SAVE_EVERY == 0 and output.suffix != ".pt":
                statistics_file.save(snapshot(), output)
    except KeyboardInterrupt:
        if tokens > start.tokens and output.suffix != ".pt":
            statistics_file.save(snapshot(), output)
        raise
    return snapshot()


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the block is through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        raise KeyboardInterrupt


@torch.no_grad()
def run_graph(graph: Graph, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """Run a captured graph on input_ids [B,S] with positions from 0; returns its outputs."""
    if not graph.closed:
        graph.program()
    position_ids = torch.arange(input_ids.shape[1]).expand(*input_ids.shape)
    given = {"input_ids": input_ids, "position_ids": position_ids}
    arguments = [
        graph.tensors[node] if node in graph.tensors else given[node.name]
        for node in graph.fx.nodes
        if node.op == "placeholder"
    ]
    return list(graph.module(*arguments))


def _resume(
    output: Path, model: dict[str, str | int], matched: Matched, text_hash: str, max_tokens: int, chunk: int
) -> Statistics | None:
    """What an earlier, interrupted or shorter run left in `output`."""
    if not output.exists():
        return None
    found = statistics_file.load(output)
    statistics_file.check_matches(found, model, [rope.form for rope in matched.ropes])
    if found.text_sha256 != text_hash:
        raise StatisticsError(f"{output} holds statistics of another text; remove it, or choose another output")
    if found.chunk != chunk:
        raise StatisticsError(
            f"{output} was measured in chunks of {found.chunk} tokens, which {chunk} cannot continue; "
            "use the same chunk, or remove it"
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
    writer = statistics_file.save_official if output.suffix == ".pt" else statistics_file.save
    writer(result, output)
