"""Requests: generate and stream against the step loop, solo runs, and the model's own greedy tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keysieve.compiler import decoding
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.decoding import prefill
from keysieve.compiler.engine import Engine, Generation, load
from keysieve.compiler.sampling import Sampling
from support.bundles import tiny_bundle, tiny_centres
from support.masked_reference import MaskedReference
from support.tiny_models import EOS, VOCABULARY, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
FREE: dict[str, Any] = {"stop_tokens": []}  # never stops early


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return load(tiny_bundle("llama", SMALL, root), threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


PROMPTS = [tokens(70), tokens(9, 1), tokens(120, 2)]


def greedy_of_the_model(prompt: Sequence[int], count: int) -> list[int]:
    model, ids = tiny_model("llama"), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Script:
    """Stands for the sampler: "draws" given tokens, one list a sequence."""

    def __init__(self, *sequences: Sequence[int]):
        self.sequences = sequences
        self.step = -1

    def __call__(self, logits: np.ndarray) -> list[int]:
        self.step += 1
        return [sequence[min(self.step, len(sequence) - 1)] for sequence in self.sequences]


def scripted(monkeypatch: pytest.MonkeyPatch, *sequences: Sequence[int]) -> None:
    monkeypatch.setattr(decoding, "Sampler", lambda sampling, batch: Script(*sequences))


# -- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 128])
def test_without_eviction_the_tokens_are_the_models(engine: Engine, length: int) -> None:
    prompt = tokens(length, 7)
    wanted = greedy_of_the_model(prompt, 20)
    for options in ({"dense": True}, {"budget": 200}, {"dense": True, "chunk": 5}):
        found = engine.generate(prompt, max_new_tokens=20, **FREE, **options)
        assert [generation.tokens for generation in found] == [wanted]
        assert found[0].reason == "length"
        assert found[0].text == engine.tokenizer.decode(wanted, skip_special_tokens=True)
        assert engine.counters is not None
        assert engine.counters.rows_held == engine.counters.tokens == [length + 19]  # the last one is not fed
        assert engine.counters.capacity == length + 20


def test_eviction_equals_the_masked_reference(engine: Engine, root: Path) -> None:
    found = engine.generate(PROMPTS, max_new_tokens=60, chunk=16, capacity=80, **FREE)
    reference = MaskedReference(tiny_model("llama"), tiny_centres("llama", root), SMALL)
    logits = [rows[-1] for rows in reference.prefill(PROMPTS, 16)]
    for n in range(60):
        new = [int(rows.argmax()) for rows in logits]
        assert new == [generation.tokens[n] for generation in found]
        if n < 59:
            logits = [rows[0] for rows in reference.feed([[token] for token in new])]
    assert engine.counters is not None
    assert engine.counters.rounds == reference.rounds
    assert engine.counters.rows_held == reference.rows_held
    assert engine.counters.rows_evicted == reference.rows_evicted
    assert min(reference.rounds) >= 1 and max(reference.rounds) >= 7


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"chunk": 7}])
def test_generate_is_stream_is_the_step_loop(engine: Engine, options: dict[str, Any]) -> None:
    found = engine.generate(PROMPTS, max_new_tokens=40, **FREE, **options)
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    for step in engine.stream(PROMPTS, max_new_tokens=40, **FREE, **options):
        for sequence, token in zip(streamed, step.tokens, strict=True):
            assert token is not None
            sequence.append(token)
    assert [generation.tokens for generation in found] == streamed
    assert all(len(sequence) == 40 for sequence in streamed)

    session = engine.session(3)  # budget + interval rows, as requests have
    sampling = {key: value for key, value in options.items() if key != "chunk"}
    sampler = decoding.Sampler(Sampling(**sampling), 3)
    logits, manual = prefill(session, PROMPTS, options.get("chunk", 16)), []
    for _ in range(40):
        manual.append(sampler(logits))
        logits = session.step(np.array(manual[-1])[:, None], np.ones(3), np.zeros((3, 1), int))[:, 0]
    assert np.array(manual).T.tolist() == streamed
    assert engine.counters is not None and engine.counters.capacity == session.capacity == 64


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 11}, {"prompt": "pinned", "budget": 140}])
def test_a_batch_equals_its_sequences_alone(engine: Engine, options: dict[str, Any]) -> None:
    together = engine.generate(PROMPTS, max_new_tokens=50, **FREE, **options)
    counters = engine.counters
    for b, prompt in enumerate(PROMPTS):
        alone = engine.generate(prompt, max_new_tokens=50, **FREE, **options)
        assert alone == [together[b]]
        assert engine.counters is not None and counters is not None
        assert engine.counters.rounds == [counters.rounds[b]]
        assert engine.counters.rows_held == [counters.rows_held[b]]
        assert engine.counters.rows_evicted == [counters.rows_evicted[b]]
    assert counters is not None and max(counters.rounds) >= 1


def test_a_pinned_prompt_equals_the_masked_reference(engine: Engine, root: Path) -> None:
    prompts = [tokens(33), tokens(6, 1)]
    pinned = replace(SMALL, prompt="pinned")
    reference = MaskedReference(tiny_model("llama"), tiny_centres("llama", root), pinned)
    found = engine.generate(prompts, max_new_tokens=100, prompt="pinned", **FREE)
    wanted = reference.prefill(prompts, 16)
    more = reference.decode([generation.tokens[:-1] for generation in found])
    for generation, first, rest in zip(found, wanted, more, strict=True):
        assert generation.tokens == [int(first[-1].argmax()), *rest.argmax(-1).tolist()]
    assert engine.counters is not None
    assert engine.counters.rounds == reference.rounds == [5, 3]
    assert all(reference.kept(layer, head, 0)[:33] == list(range(33)) for layer in range(3) for head in range(2))
    assert [g.tokens for g in engine.generate(prompts, max_new_tokens=100, **FREE)] != [g.tokens for g in found]


def test_budgets_may_differ_by_sequence(engine: Engine) -> None:
    prompts = [tokens(20), tokens(20)]
    found = engine.generate(prompts, max_new_tokens=80, budget=[24, 64], **FREE)
    assert engine.counters is not None
    assert engine.counters.rounds == [(99 - 24) // 16, (99 - 64) // 16]
    assert engine.counters.rows_held == [24 + (99 - 24) % 16, 64 + (99 - 64) % 16]
    assert found[0].tokens != found[1].tokens
    assert engine.generate(prompts[1], max_new_tokens=80, budget=64, **FREE) == [found[1]]


def test_a_smaller_budget_holds_fewer_rows(engine: Engine) -> None:
    held = []
    for budget in (20, 40, 80):
        engine.generate(tokens(100), max_new_tokens=30, budget=budget, **FREE)
        assert engine.counters is not None
        held.append((engine.counters.rows_held[0], engine.counters.kv_bytes, engine.counters.rounds[0]))
        assert held[-1][0] < budget + 16
    assert held == sorted(held) and held[0][0] < held[1][0] < held[2][0]
    assert [size for _, size, _ in held] == [768 * rows for rows in (36, 56, 96)]


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_sequence_and_is_left_out(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 2.0, "seed": 4}
    free = engine.generate(PROMPTS[0], **options, **FREE)[0]
    where = next(n for n in range(5, 30) if free.tokens[n] not in free.tokens[:n])
    stopped = engine.generate(PROMPTS[0], stop_tokens=[free.tokens[where]], **options)[0]
    assert (stopped.tokens, stopped.reason) == (free.tokens[:where], "stop")
    steps = list(engine.stream(PROMPTS[0], stop_tokens=[free.tokens[where]], **options))
    assert [step.tokens[0] for step in steps] == free.tokens[: where + 1]  # the stream shows it
    assert "".join(step.texts[0] for step in steps) == stopped.text
    assert engine.timing.decoded_tokens == where  # all but the first


def test_the_models_own_end_token_stops_by_default(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [10, 11, EOS, 12])
    assert engine.manifest["stop_tokens"] == [EOS]
    assert engine.generate([5], max_new_tokens=8)[0].tokens == [10, 11]
    scripted(monkeypatch, [10, 11, EOS, 12])
    assert engine.generate([5], max_new_tokens=4, **FREE)[0].tokens == [10, 11, EOS, 12]
    scripted(monkeypatch, [EOS])
    assert engine.generate([5], max_new_tokens=8) == [Generation("", [], "stop")]


def test_finished_sequences_do_not_disturb_the_others(engine: Engine) -> None:
    alone = [engine.generate(prompt, max_new_tokens=60, **FREE)[0].tokens for prompt in PROMPTS]
    stop = alone[1][4]
    wanted = [part[: part.index(stop)] if stop in part else part for part in alone]
    assert len(wanted[1]) <= 4 and max(map(len, wanted)) > 40
    found = engine.generate(PROMPTS, max_new_tokens=60, stop_tokens=[stop])
    assert [generation.tokens for generation in found] == wanted
    assert [generation.reason for generation in found] == ["stop" if stop in part else "length" for part in alone]
    assert engine.counters is not None
    assert engine.counters.tokens == [
        len(prompt) + len(part) - (stop not in whole)
        for prompt, part, whole in zip(PROMPTS, wanted, alone, strict=True)
    ]
    steps = list(engine.stream(PROMPTS, max_new_tokens=60, stop_tokens=[stop]))
    shown = [step.tokens[1] for step in steps]
    ended = len(wanted[1])
    assert shown[ended] == stop and set(shown[ended + 1 :]) == {None}
    assert {step.texts[1] for step in steps[ended + 1 :]} == {""}


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_the_seed_decides(engine: Engine) -> None:
    def run(**options: Any) -> list[int]:
        return engine.generate(PROMPTS[0], max_new_tokens=30, **FREE, **options)[0].tokens

    greedy = run()
    assert run(temperature=0.0, seed=1) == run(temperature=0.0, seed=2, top_p=0.5) == greedy
    assert run(temperature=5.0, top_k=1, seed=1) == run(temperature=5.0, top_p=1e-6, seed=1) == greedy
    first = run(temperature=1.5, seed=1)
    assert first == run(temperature=1.5, seed=1) != run(temperature=1.5, seed=2)
    assert first != greedy


# -- text --------------------------------------------------------------------------------------------------------------


def test_streamed_text_is_the_final_text(engine: Engine) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 2.0, "seed": 3, **FREE}
    pieces: list[str] = ["" for _ in PROMPTS]
    for step in engine.stream(PROMPTS, **options):
        pieces = [piece + text for piece, text in zip(pieces, step.texts, strict=True)]
    texts = [generation.text for generation in engine.generate(PROMPTS, **options)]
    assert pieces == texts
    assert any("\ufffd" in text for text in texts)  # random bytes: some are no UTF-8


def test_a_character_of_several_tokens_comes_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 漢字 costs 3 €, 🎉 e\u0301 done"
    ids = engine.tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # most characters here take several tokens
    scripted(monkeypatch, ids)
    pieces = [step.texts[0] for step in engine.stream([5], max_new_tokens=len(ids), **FREE)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🎉" in "".join(piece for piece in pieces if "🎉" in piece)
    scripted(monkeypatch, ids)
    cut = len(engine.tokenizer("naïve 漢")["input_ids"]) - 1  # the generation ends inside a character
    pieces = [step.texts[0] for step in engine.stream([5], max_new_tokens=cut, **FREE)]
    assert "".join(pieces) == "naïve \ufffd"


def test_a_text_prompt_is_tokenized(engine: Engine) -> None:
    text = "The cache of a decoder"
    ids = engine.tokenizer(text)["input_ids"]
    assert engine.generate(text, max_new_tokens=5, **FREE) == engine.generate(ids, max_new_tokens=5, **FREE)
    assert engine.timing.prompt_tokens == len(ids)
    both = engine.generate([text, np.array(ids)[:4]], max_new_tokens=5, **FREE)
    assert len(both) == 2 and both[0] == engine.generate([text], max_new_tokens=5, **FREE)[0]


def test_chat_wraps_the_prompt_in_the_models_template(engine: Engine) -> None:
    found = engine.generate("evict the rows", max_new_tokens=8, chat=True, **FREE)
    ids = tiny_tokenizer()("<user>evict the rows\n<assistant>")["input_ids"]
    assert found == engine.generate(ids, max_new_tokens=8, **FREE)
    assert engine.timing.prompt_tokens == len(ids)
    assert found != engine.generate("evict the rows", max_new_tokens=8, **FREE)


# -- resources ---------------------------------------------------------------------------------------------------------


def test_the_capacity_is_no_larger_than_needed(engine: Engine) -> None:
    def capacity(prompt: int, new: int, **options: Any) -> int:
        engine.generate(tokens(prompt), max_new_tokens=new, **FREE, **options)
        assert engine.counters is not None
        return engine.counters.capacity

    assert capacity(10, 20) == 30  # all tokens fit
    assert capacity(100, 5) == 64  # budget + interval
    assert capacity(100, 5, chunk=40) == 88  # budget + chunk
    assert capacity(100, 5, budget=30) == 46
    assert capacity(100, 5, capacity=90) == 90
    assert capacity(100, 5, dense=True) == 105


def test_timing_counts_prompt_and_decoded_tokens(engine: Engine) -> None:
    engine.generate(PROMPTS, max_new_tokens=12, **FREE)
    timing = engine.timing
    assert (timing.prompt_tokens, timing.decoded_tokens) == (199, 33)  # the first three come with the prompts
    assert timing.prompt_seconds > 0 and timing.decode_seconds > 0
    assert timing.tokens_per_s == pytest.approx(33 / timing.decode_seconds)


def test_threads_are_the_cores_that_the_process_may_use(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(usable: int, given: int | None = None) -> int:
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(usable)), raising=False)
        session = load(engine.bundle.path, given)._runtime._session  # type: ignore[attr-defined]
        return int(session.get_session_options().intra_op_num_threads)

    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert [threads(1), threads(3), threads(4), threads(3, 2)] == [1, 3, 0, 2]


def test_an_abandoned_stream_leaves_the_engine_usable(engine: Engine) -> None:
    wanted = engine.generate(PROMPTS[0], max_new_tokens=10, **FREE)
    stream = engine.stream(PROMPTS[0], max_new_tokens=10, **FREE)
    first = [next(stream).tokens[0], next(stream).tokens[0]]
    stream.close()
    assert first == wanted[0].tokens[:2]
    interleaved = [engine.stream(PROMPTS[0], max_new_tokens=10, **FREE) for _ in range(2)]
    both = [(a.tokens[0], b.tokens[0]) for a, b in zip(*interleaved, strict=True)]
    assert both == [(token, token) for token in wanted[0].tokens]
    assert engine.generate(PROMPTS[0], max_new_tokens=10, **FREE) == wanted
