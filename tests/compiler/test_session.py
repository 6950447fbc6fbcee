"""The step loop: the model itself while nothing is evicted, and the masked reference when something is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler.config import SCOPES, EvictionConfig, PolicyConfig
from keysieve.compiler.decoding import prefill
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.session import Session
from keysieve.errors import EngineError
from support.bundles import tiny_bundle, tiny_centres, tiny_statistics
from support.masked_forward import forward
from support.masked_reference import MaskedReference
from support.tiny_models import DECODERS, VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
ROOMY = 48 + 16 + 16  # rows that hold budget, interval and a chunk: the engine never has to hurry
POLICIES = {
    "mean": PolicyConfig("triattention"),
    "max": PolicyConfig("triattention", aggregation="max"),
    "online": PolicyConfig("triattention", centres="online"),
    "online-from-statistics": PolicyConfig("triattention", centres="online"),
    "streaming": PolicyConfig("streaming"),
    "key-norm": PolicyConfig("key-norm"),
    "random": PolicyConfig("random"),
}
# One bundle a decoder; together they have every policy and every scope.
CASES = {
    "llama": ("mean", "per_layer_per_head"),
    "llama_mha": ("random", "per_layer_per_head"),
    "llama_llama3": ("online", "union"),
    "llama_linear": ("key-norm", "per_head"),
    "llama_yarn": ("max", "per_head"),
    "qwen3": ("max", "union"),
    "gpt_neox": ("online-from-statistics", "per_layer_per_head"),
    "cohere": ("mean", "per_head"),
    "smollm3": ("streaming", "union"),
}
FAST = ("llama", "gpt_neox", "cohere", "smollm3")  # every form of RoPE; each bundle costs seconds
MODELS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DECODERS]
# Score and select are nodes of their own: one policy in every scope, and every policy in one scope that CASES lacks.
MATRIX = [("mean", scope) for scope in SCOPES] + [
    (policy, SCOPES[index % len(SCOPES)]) for index, policy in enumerate(POLICIES) if policy != "mean"
]


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


_engines: dict[Path, Engine] = {}


def open_engine(name: str, policy: str, scope: str, root: Path) -> tuple[Engine, EvictionConfig]:
    eviction = replace(SMALL, policy=POLICIES[policy], scope=scope)
    options = {"stats": tiny_statistics(name, root)} if policy == "online-from-statistics" else {}
    path = tiny_bundle(name, eviction, root, **options)
    if path not in _engines:
        _engines[path] = load(path, threads=1)
    return _engines[path], eviction


@pytest.fixture(scope="module")
def llama(root: Path) -> Engine:
    return open_engine("llama", *CASES["llama"], root)[0]


def parts_of(prompts: Sequence[Sequence[int]], chunk: int) -> list[list[list[int]]]:
    """Prompts as steps that all end together: each has one partial chunk, its first."""
    longest = max(len(prompt) for prompt in prompts)
    ends = list(range(longest, 0, -chunk))[::-1]
    steps = []
    for end in ends:
        begin = max(end - chunk, 0)
        steps.append([list(p[max(0, begin - longest + len(p)) : max(0, end - longest + len(p))]) for p in prompts])
    return steps


def feed(session: Session, new: Sequence[Sequence[int]], following: int = 1) -> list[np.ndarray]:
    """One step of any number of tokens for each sequence -> logits [n_new,V] of each."""
    size = max(len(part) for part in new)
    ids = np.zeros((len(new), size), np.int64)
    for row, part in enumerate(new):
        ids[row, : len(part)] = part
    count = np.array([len(part) for part in new])
    logits = session.step(ids, count, np.arange(size)[None].repeat(len(new), 0), following)
    return [logits[row, : len(part)].copy() for row, part in enumerate(new)]


# -- without eviction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_step_are_the_models(name: str, root: Path) -> None:
    engine, model = open_engine(name, *CASES[name], root)[0], tiny_model(name)
    batches = [[tokens(1)], [tokens(7)], [tokens(128)], [tokens(600)], [tokens(61), tokens(1, 1), tokens(200, 2)]]
    for prompts in batches:
        session = engine.session(len(prompts), dense=True, capacity=max(map(len, prompts)) + 24)
        logits: list[list[np.ndarray]] = [[] for _ in prompts]
        texts = [list(prompt) for prompt in prompts]
        new = None
        steps = parts_of(prompts, 128)
        for number in range(len(steps) + 24):
            new = steps[number] if number < len(steps) else [[int(rows[-1][-1].argmax())] for rows in logits]
            for row, (found, part) in enumerate(zip(feed(session, new), new, strict=True)):
                logits[row].append(found)
                texts[row] += part if number >= len(steps) else []
        for prompt, text, found in zip(prompts, texts, logits, strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([text]), use_cache=False).logits[0].numpy()
            np.testing.assert_allclose(np.concatenate(found), wanted, atol=2e-4, rtol=0)
            assert wanted[len(prompt) - 1 : -1].argmax(-1).tolist() == text[len(prompt) :]
        counters = session.counters
        assert counters.rows_held == counters.tokens == [len(text) for text in texts]
        assert counters.rounds == counters.rows_evicted == [0] * len(prompts)


def test_a_budget_that_is_never_reached_changes_nothing(llama: Engine) -> None:
    prompts = [tokens(50), tokens(20, 1)]
    dense = llama.session(2, dense=True, capacity=64)
    roomy = llama.session(2, budget=64, capacity=64)
    for step in [*parts_of(prompts, 16), *[[[5], [6]]] * 14]:
        for a, b in zip(feed(dense, step), feed(roomy, step), strict=True):
            np.testing.assert_array_equal(a, b)
    assert roomy.counters.rounds == [0, 0]


@pytest.mark.parametrize("chunk", [1, 5, 64, 100])
def test_prefill_gives_the_logits_after_every_prompt(llama: Engine, chunk: int) -> None:
    prompts = [tokens(64), tokens(3, 1), tokens(33, 2)]
    session = llama.session(3, dense=True, capacity=100)
    found = prefill(session, prompts, chunk)
    for prompt, row in zip(prompts, found, strict=True):
        with torch.no_grad():
            wanted = tiny_model("llama")(torch.tensor([prompt])).logits[0, -1]
        np.testing.assert_allclose(row, wanted.numpy(), atol=1e-4, rtol=0)


# -- with eviction -------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """The absolute positions that the rows of a session hold, followed through its plans: rows[l][b][h]."""

    rows: list[list[list[list[int]]]]
    fed: list[int]

    @classmethod
    def nothing(cls, layers: int, batch: int, kv_heads: int) -> "Kept":
        return cls([[[[] for _ in range(kv_heads)] for _ in range(batch)] for _ in range(layers)], [0] * batch)

    def follow(self, session: Session, new: Sequence[Sequence[int]]) -> np.ndarray:
        """Append a step's tokens and apply what the step planned; returns keep [B] (-1: not due)."""
        plan, keep = session._now["plan"].array.copy(), session._now["keep"].array.copy()
        for layer, sequences in enumerate(self.rows):
            for b, heads in enumerate(sequences):
                for head, held in enumerate(heads):
                    held += range(self.fed[b], self.fed[b] + len(new[b]))
                    if keep[b] >= 0:
                        rows = plan[min(layer, plan.shape[0] - 1), b, min(head, plan.shape[2] - 1), : keep[b]]
                        heads[head] = [held[row] for row in rows]
        for b, part in enumerate(new):
            self.fed[b] += len(part)
        return keep.copy()


def check_against_reference(
    engine: Engine,
    reference: MaskedReference,
    session: Session,
    prompts: Sequence[Sequence[int]],
    more: Sequence[Sequence[int]],
    hurried: bool = False,
    chunk: int = 16,
) -> None:
    """Feed prompts, then `more` one by one: logits, rows kept and counters are the reference's all the way.

    hurried: capacity is budget + interval, so a step evicts early where the next chunk would not fit.
    """
    sizes = engine.manifest["sizes"]
    kept = Kept.nothing(sizes["layers"], len(prompts), sizes["kv_heads"])
    mixed = 0

    def same_state() -> None:
        counters = session.counters
        assert counters.rounds == reference.rounds
        assert counters.rows_held == reference.rows_held == [len(rows[0]) for rows in kept.rows[0]]
        assert counters.rows_evicted == reference.rows_evicted
        assert counters.tokens == session.position.tolist() == kept.fed
        for layer, sequences in enumerate(kept.rows):
            for b, heads in enumerate(sequences):
                for head, held in enumerate(heads):
                    assert held == reference.kept(layer, head, b)

    steps = parts_of(prompts, chunk)
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        limit = reference.eviction.budget + 1 if hurried and not last else None
        wanted = reference.feed(step, limit)
        found = feed(session, step, 1 if last else chunk)
        keep = kept.follow(session, step)
        mixed += bool((keep >= 0).any() and (keep < 0).any())
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-4, rtol=0)
        same_state()
    for start in range(0, len(more[0]), 20):
        wanted = reference.decode([rest[start : start + 20] for rest in more])
        for n in range(start, min(start + 20, len(more[0]))):
            step = [[rest[n]] for rest in more]
            found = feed(session, step)
            keep = kept.follow(session, step)
            mixed += bool((keep >= 0).any() and (keep < 0).any())
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a[0], b[n - start].numpy(), atol=1e-4, rtol=0)
        same_state()
    assert max(reference.rounds) >= 4
    assert mixed >= 4 or len(prompts) == 1


def check_case(name: str, policy: str, scope: str, root: Path, hurried: bool = False) -> None:
    engine, eviction = open_engine(name, policy, scope, root)
    needed = eviction.policy.needs_statistics or policy == "online-from-statistics"
    centres = tiny_centres(name, root) if needed else None
    reference = MaskedReference(tiny_model(name), centres, eviction)
    session = engine.session(3, capacity=None if hurried else ROOMY)
    prompts, more = [tokens(70), tokens(9, 1), tokens(120, 2)], [tokens(60, seed) for seed in (3, 4, 5)]
    check_against_reference(engine, reference, session, prompts, more, hurried)


@pytest.mark.parametrize("name", MODELS)
def test_eviction_equals_the_masked_reference(name: str, root: Path) -> None:
    check_case(name, *CASES[name], root)


def test_the_cases_have_every_policy_and_scope() -> None:
    assert set(CASES) == set(DECODERS)
    assert {policy for policy, _ in CASES.values()} == set(POLICIES)
    assert {scope for _, scope in CASES.values()} == set(SCOPES)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "scope"), MATRIX)
def test_every_scope_and_every_policy(policy: str, scope: str, root: Path) -> None:
    check_case("llama_linear", policy, scope, root)


def test_the_default_capacity_evicts_early_for_the_next_chunk(root: Path) -> None:
    check_case("llama", *CASES["llama"], root, hurried=True)


def test_budgets_may_differ_by_sequence(root: Path) -> None:
    name, budgets = "llama", [30, 48, 64]
    engine, eviction = open_engine(name, *CASES[name], root)
    session = engine.session(3, budget=budgets, capacity=64 + 16 + 16)
    assert session.counters.capacity == 96
    prompts, more = [tokens(70, seed) for seed in (0, 1, 2)], [tokens(40, seed) for seed in (3, 4, 5)]
    references = [
        MaskedReference(tiny_model(name), tiny_centres(name, root), replace(eviction, budget=b)) for b in budgets
    ]
    for step in [*parts_of(prompts, 16), *([[rest[n]] for rest in more] for n in range(40))]:
        found = feed(session, step, 16)
        for b, reference in enumerate(references):
            np.testing.assert_allclose(found[b], reference.feed([step[b]])[0].numpy(), atol=1e-4, rtol=0)
    for name in ("rounds", "rows_held", "rows_evicted"):
        assert getattr(session.counters, name) == [getattr(reference, name)[0] for reference in references]
    assert session.counters.rounds == [4, 3, 2]


def test_pinned_rows_stay(root: Path) -> None:
    engine, eviction = open_engine("llama", *CASES["llama"], root)
    prompts, more = [tokens(31), tokens(7, 1)], [tokens(100, seed) for seed in (3, 4)]
    reference = MaskedReference(tiny_model("llama"), tiny_centres("llama", root), eviction, pinned=[31, 7])
    session = engine.session(2, capacity=ROOMY, pinned=[31, 7])
    check_against_reference(engine, reference, session, prompts, more)
    assert all(reference.kept(1, head, 0)[:31] == list(range(31)) for head in range(2))


def test_positions_go_on_counting_after_an_eviction(root: Path) -> None:
    """Keys of layer 0 depend on token and position alone, so the cache must hold those of the kept positions."""
    engine, _ = open_engine("llama", *CASES["llama"], root)
    model, ids = tiny_model("llama"), tokens(150)
    session, kept = engine.session(1, capacity=ROOMY), Kept.nothing(3, 1, 2)
    for part in [*parts_of([ids[:100]], 16), *([[token]] for token in ids[100:])]:
        feed(session, part, 16 if kept.fed[0] < 84 else 1)
        keep = kept.follow(session, part)
    assert keep[0] == -1  # the last plan has been executed, so the rows lie where they should
    _, layers = forward(model, ids, lambda layer, count: np.tri(count, dtype=bool)[None].repeat(4, 0))
    keys = session._caches["key_0"].array[0]
    for head in range(2):
        held = kept.rows[0][0][head]
        assert held[-1] == 149 and held[20] != 20
        np.testing.assert_allclose(keys[head, : len(held)], layers[0][1][head][held], atol=1e-5, rtol=0)
    assert session.position.tolist() == [150]


# -- counters and memory -------------------------------------------------------------------------------------


def test_counters_are_exact(root: Path) -> None:
    engine, _ = open_engine("smollm3", *CASES["smollm3"], root)
    session = engine.session(1, capacity=ROOMY)
    seen = []
    for part in [*parts_of([tokens(50)], 16), *([[token]] for token in tokens(14 + 33, 1))]:
        feed(session, part, 16)
        counters = session.counters
        seen.append((counters.tokens[0], counters.rows_held[0], counters.rows_evicted[0], counters.rounds[0]))
    assert [entry for entry in seen if entry[3] == 0][-1] == (63, 63, 0, 0)
    assert seen[len(seen) - 34] == (64, 48, 16, 1)  # reached 48 + 16 rows: back to 48
    assert seen[-18:-16] == [(80, 48, 32, 2), (81, 49, 32, 2)]
    assert seen[-1] == (97, 49, 48, 3)
    assert all(tokens == held + evicted for tokens, held, evicted, _ in seen)


def test_kv_bytes_are_those_of_the_buffers(llama: Engine) -> None:
    for batch, capacity in ((1, 64), (3, 100)):
        session = llama.session(batch, capacity=capacity)
        assert session.counters.kv_bytes == 3 * 2 * batch * 2 * capacity * 16 * 4
        assert session.counters.kv_bytes == sum(cache.array.nbytes for cache in session._caches.values())
        assert (session.counters.batch, session.counters.layers, session.counters.capacity) == (batch, 3, capacity)


def test_a_smaller_budget_holds_fewer_rows_in_fewer_bytes(llama: Engine) -> None:
    held, evicted, size = [], [], []
    for budget in (20, 40, 80):
        session = llama.session(budget=budget)
        assert session.capacity == budget + 16
        for part in parts_of([tokens(200)], 16):
            feed(session, part, 16)
        held.append(session.counters.rows_held[0])
        evicted.append(session.counters.rows_evicted[0])
        size.append(session.counters.kv_bytes)
    assert held == [20, 40, 80]
    assert evicted == [180, 160, 120]
    assert size == [36 * 768, 56 * 768, 96 * 768]


def test_caches_stay_where_they_are(llama: Engine) -> None:
    session = llama.session(2)
    buffers = {name: (cache.value.data_ptr(), cache.array.shape) for name, cache in session._caches.items()}
    size = session.counters.kv_bytes
    prefill(session, [tokens(100), tokens(30, 1)], 16)
    for n in range(300):
        session.step(np.array([[3 + n % 300], [5]]), np.ones(2), np.zeros((2, 1), int))
        assert (session.rows <= 64).all()
    assert {name: (cache.value.data_ptr(), cache.array.shape) for name, cache in session._caches.items()} == buffers
    assert session.counters.kv_bytes == size
    assert min(session.counters.rounds) >= 17


def test_logits_outlive_their_session_and_steps_of_another_size(llama: Engine) -> None:
    session, ids = llama.session(dense=True, capacity=64), np.array([tokens(40)])
    logits = session.step(ids, np.array([40]), np.arange(40)[None])
    expected = logits.copy()
    session.step(ids[:, :1], np.array([1]), np.zeros((1, 1), int))
    del session
    others = [np.ones((1, 40, VOCABULARY), np.float32) for _ in range(20)]  # would be put into freed memory
    np.testing.assert_array_equal(logits, expected)
    assert len(others) == 20


def test_sequences_that_get_no_token_stay_as_they_are(llama: Engine) -> None:
    session, alone = llama.session(2, capacity=ROOMY), llama.session(1, capacity=ROOMY)
    first = [tokens(40), tokens(12, 1)]
    feed(session, first)
    feed(alone, [first[1]])
    for token in tokens(40, 2):
        assert feed(session, [[token], []])[1].shape == (0, VOCABULARY)
    found, wanted = feed(session, [[], [7, 8]])[1], feed(alone, [[7, 8]])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    assert session.counters.tokens == [80, 14] and session.counters.rounds == [1 + (80 - 64) // 16, 0]


# -- what does not fit ---------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(llama: Engine) -> None:
    session = llama.session(dense=True, capacity=20)
    feed(session, [tokens(15)])
    with pytest.raises(EngineError, match=r"6 tokens does not fit: 15 rows are held and the capacity is 20.*at most 5"):
        feed(session, [tokens(6)])
    assert session.counters.tokens == [15]
    feed(session, [tokens(5)])
    assert session.counters.rows_held == [20]


def test_a_session_checks_its_budget_and_capacity(llama: Engine) -> None:
    with pytest.raises(EngineError, match=r"budget 10 leaves no row to choose.*2 sinks and 8 recent.*above 10"):
        llama.session(2, budget=[11, 10])
    with pytest.raises(EngineError, match="a dense session needs a capacity"):
        llama.session(dense=True)
