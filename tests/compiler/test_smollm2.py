"""SmolLM2-135M-Instruct, the real model: equal to HuggingFace, equal to the masked reference, flat in memory."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from keysieve.compiler import statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.progress import Progress
from support.masked_reference import MaskedReference

pytestmark = pytest.mark.slow

EVICTION = EvictionConfig(PolicyConfig("triattention"), budget=256, interval=32, sinks=4, recent=64)
STORY = (
    "In the spring of 1831 a young surveyor named Ellen Marsh walked along the northern coast with a brass compass, "
    "two notebooks and a mule that did not like bridges. She had been asked to draw the harbours between the river "
    "and the old lighthouse, and to say which of them a ship of forty guns could use in a storm. "
)


@pytest.fixture(scope="module")
def statistics(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("smollm2") / "stats.safetensors"
    calibrate(smollm2, file, max_tokens=1024, progress=Progress(quiet=True), gates=False)
    return file


@pytest.fixture(scope="module")
def engine(smollm2: Path, statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    bundle = tmp_path_factory.mktemp("smollm2") / "bundle"
    compile(smollm2, bundle, CompileConfig(EVICTION, stats=statistics), progress=Progress(quiet=True))
    return load(bundle)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[PreTrainedModel]:
    yield AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    return engine.tokenizer(STORY * 12)["input_ids"]


def check_greedy(engine: Engine, model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> None:
    """The prompts, then `count` greedy tokens: the logits of every step are the model's, and so are the tokens."""
    session = engine.session(len(prompts), dense=True, capacity=max(map(len, prompts)) + count)
    longest = max(len(prompt) for prompt in prompts)
    padded = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    first = session.step(padded, lengths, np.arange(longest)[None].repeat(len(prompts), 0)).copy()
    logits = [[part[: len(prompt)]] for part, prompt in zip(first, prompts, strict=True)]
    texts = [list(prompt) for prompt in prompts]
    for _ in range(count):
        new = [int(rows[-1][-1].argmax()) for rows in logits]
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        found = session.step(np.array(new)[:, None], np.ones(len(new)), np.zeros((len(new), 1), int))
        for row, rows in enumerate(logits):
            rows.append(found[row].copy())
    for prompt, text, rows in zip(prompts, texts, logits, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
        assert np.abs(np.concatenate(rows) - wanted).max() < 2e-4
        assert wanted[len(prompt) - 1 : -1].argmax(-1).tolist() == text[len(prompt) :]
    assert session.counters.rows_evicted == [0] * len(prompts)


@pytest.mark.parametrize("length", [1, 7, 128, 600])
def test_greedy_generation_is_the_models(engine: Engine, model: PreTrainedModel, ids: list[int], length: int) -> None:
    check_greedy(engine, model, [ids[:length]], 256)


def test_a_greedy_batch_is_the_models(engine: Engine, model: PreTrainedModel, ids: list[int]) -> None:
    check_greedy(engine, model, [ids[:7], ids[40:168], ids[5:66]], 256)


def test_eviction_equals_the_masked_reference(
    engine: Engine, model: PreTrainedModel, ids: list[int], statistics: Path
) -> None:
    centres = [(layer.q_mean, layer.q_abs) for layer in statistics_file.load(statistics).layers]
    reference = MaskedReference(model, centres, replace(EVICTION, budget=192))
    prompt, more = ids[:200], ids[300:460]
    session = engine.session(budget=192, capacity=192 + 32 + 32)
    wanted, found = [reference.feed([prompt[:8]])[0]], []
    for start, end in ((0, 8), *((n, n + 32) for n in range(8, 200, 32))):
        part = prompt[start:end]
        logits = session.step(np.array([part]), np.array([len(part)]), np.arange(len(part))[None], 32)
        found.append(logits[0].copy())
        if start:
            wanted += reference.feed([part])
    wanted += reference.decode([more])
    for token in more:
        found.append(session.step(np.array([[token]]), np.array([1]), np.zeros((1, 1), int))[0].copy())
    assert np.abs(np.concatenate(found) - torch.cat(wanted).numpy()).max() < 1e-3
    counters = session.counters
    assert counters.rounds == reference.rounds == [5]
    assert counters.rows_held == reference.rows_held == [200]
    assert counters.rows_evicted == reference.rows_evicted == [160]


def test_a_long_run_is_flat_in_memory(engine: Engine, ids: list[int]) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    resident, sizes, held = [], set(), []
    for _ in engine.stream(ids[:20], max_new_tokens=1030, stop_tokens=[]):
        assert engine.counters is not None
        sizes.add(engine.counters.kv_bytes)
        held.append(engine.counters.rows_held[0])
        if engine.counters.rounds[0] >= 1:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
    assert engine.counters is not None
    assert sizes == {30 * 2 * 3 * 64 * 4 * (256 + 32)}
    assert engine.counters.tokens == [20 + 1029]
    assert engine.counters.rounds == [(1049 - 256) // 32]
    assert engine.counters.rows_evicted == [32 * ((1049 - 256) // 32)]
    assert engine.counters.rows_held == [256 + (1049 - 256) % 32]
    assert max(held) == 256 + 31
    assert max(resident) < 1.02 * resident[0]


def test_the_seeded_chat_text_is_reproducible_and_streams(engine: Engine) -> None:
    question = "Name three things a lighthouse keeper does."
    options = {"max_new_tokens": 24, "temperature": 0.7, "top_p": 0.9, "seed": 1, "chat": True}
    found = engine.generate(question, **options)[0]
    assert found.text == "".join(step.texts[0] for step in engine.stream(question, **options))
    assert len(found.text.split()) >= 5
