"""The torch engine on a CPU: the tokens and counters of ONNX Runtime, and nothing of a step decided by the host."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.errors import EngineError
from support.bundles import tiny_bundle
from support.tiny_models import VOCABULARY

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
FREE = {"max_new_tokens": 120, "stop_tokens": []}


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [tokens(70, 0), tokens(9, 1), tokens(120, 2)]


@pytest.fixture(scope="module")
def wanted(root: Path) -> Engine:
    return load(tiny_bundle("llama", EVICTION, root), threads=1)


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return tiny_bundle("llama", EVICTION, root, target="torch")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.2, "top_k": 7, "seed": 1},
        {"stop_tokens": [5, 17, 40]},
        {"budget": [40, 60, 48]},
        {"budget": 150, "prompt": "pinned"},
        {"chunk": 5},
        {"capacity": 90},
        {"dense": True},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_tokens_and_counters_are_onnx_runtimes(engine: Engine, wanted: Engine, options: dict[str, object]) -> None:
    found, expected = (one.generate(PROMPTS, **FREE | options) for one in (engine, wanted))
    assert found == expected
    assert engine.counters == wanted.counters
    if "budget" not in options and len(options) < 2 and not {"dense", "max_new_tokens", "stop_tokens"} & set(options):
        assert min(engine.counters.rounds) >= 4


def test_steps_by_hand(engine: Engine, wanted: Engine) -> None:
    """Chunks and padding as a caller likes them: the logits of every step."""
    sessions = [one.session(2, capacity=80) for one in (engine, wanted)]
    for width in [16, 16, 16, 7, *[1] * 40]:
        ids = np.array([tokens(width, width), tokens(width, width + 1)])
        count = np.array([width, max(1, width // 2)], np.int32)
        at = np.array([[0, width - 1], [0, count[1] - 1]])
        found, expected = (session.step(ids, count, at, 16 if width > 1 else 1) for session in sessions)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        for seen in (lambda session: session.rows, lambda session: session.position):
            np.testing.assert_array_equal(*map(seen, sessions))
    assert sessions[0].counters == sessions[1].counters and min(sessions[0].counters.rounds) > 0


@pytest.mark.parametrize("options", [{}, {"stop_tokens": [5, 17, 40]}, {"max_new_tokens": 2}], ids=str)
def test_a_step_ahead_changes_no_token(bundle: Path, engine: Engine, options: dict[str, object]) -> None:
    """As on a GPU, where the host reads the tokens of the step before."""
    other = load(bundle)
    other.session(len(PROMPTS), capacity=64, total=120 + 120).close()
    for one in (engine, other):
        one.generate(PROMPTS, **FREE | options)
    other._runtime._idle[1].ahead = 1
    assert other.generate(PROMPTS, **FREE | options) == engine.generate(PROMPTS, **FREE | options)
    assert other._runtime._idle[1].ahead == 1 and other.counters == engine.counters


def test_the_time_of_a_token_is_its_own(engine: Engine) -> None:
    """No decoding step counts as prompt."""
    engine.generate(PROMPTS[0], max_new_tokens=12, stop_tokens=[])
    first = engine.timing
    assert first.decoded_tokens == 11 and first.decode_seconds / 11 > 0.1 * first.prompt_seconds / 70


def test_a_session_is_handed_back_once(bundle: Path) -> None:
    engine = load(bundle)
    session = engine.session(1)
    session.close()
    taken = engine.session(1)
    session.close()
    assert taken is session or engine.session(1) is not taken


@pytest.mark.parametrize("token", [-1, -VOCABULARY, 10**9])
def test_stop_tokens_that_no_model_has_stop_nothing(engine: Engine, wanted: Engine, token: int) -> None:
    options = FREE | {"stop_tokens": [token], "max_new_tokens": 20}
    assert engine.generate(PROMPTS, **options) == wanted.generate(PROMPTS, **options)


def test_no_threads_are_refused(bundle: Path) -> None:
    with pytest.raises(EngineError, match="threads is 0; it must be at least 1"):
        load(bundle, threads=0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_text_that_the_caller_ends_takes_no_further_part(engine: Engine, ahead: int) -> None:
    session = engine.session(2, capacity=80)
    session.ahead = ahead
    steps = session.decode(PROMPTS[:2], 16, engine_sampling(), set(), 60)
    next(steps)
    for _ in range(5):
        steps.send(np.array([True, True]))
    for _ in range(20):
        steps.send(np.array([False, True]))
    after = session.counters
    assert after.tokens[0] - len(PROMPTS[0]) in (5 + ahead, 6 + ahead) and after.tokens[1] - len(PROMPTS[1]) >= 25


def engine_sampling():
    from keysieve.compiler.sampling import Sampling

    return Sampling()


def test_the_buffers_of_a_request_serve_the_next(bundle: Path) -> None:
    engine = load(bundle)
    first = engine.generate(PROMPTS, **FREE)
    session = engine._runtime._idle[1]
    assert engine.generate(PROMPTS, **FREE) == first
    assert engine._runtime._idle[1] is session
    other = engine.generate(PROMPTS[:1], **FREE)
    assert engine._runtime._idle[1] is not session and other == first[:1]


class Traced:
    """Stands for a CUDA graph: from the second step of a kind on, the operations of that step run again as recorded.

    What the host decided while recording would be repeated, as in a graph that is replayed.
    """

    captures = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.recorded: dict[object, object] = {}
        self.session = None
        self.replays = 0

    def __call__(self, kind, work):
        if kind not in self.recorded:
            self.recorded[kind] = None
            return work()
        places = self.places(kind)
        if self.recorded[kind] is None:
            before = [tensor.clone() for _, _, tensor in places]
            self.recorded[kind] = make_fx(lambda *proxies: self.with_these(places, proxies, work))(
                *(tensor for _, _, tensor in places)
            )
            for tensor, value in zip((p[2] for p in places), before, strict=True):
                tensor.copy_(value)  # recording ran the step too
        self.replays += 1
        return self.recorded[kind](*(tensor for _, _, tensor in places))

    def places(self, kind):
        """Every tensor that a step may read or change, and where it is kept."""
        session = self.session
        found = [(session._held, name, tensor) for name, tensor in session._held.items()]
        found += [(group, name, tensor) for group in session._steps.values() for name, tensor in group.items()]
        owners = [(session, ("_rounds", "_ends", "_drawn"))]
        if not isinstance(kind, tuple):
            owners.append((kind, ("_numbers", "_drawn")))
        return found + [(vars(owner), name, getattr(owner, name)) for owner, names in owners for name in names]

    @staticmethod
    def with_these(places, proxies, work):
        for (owner, name, _), proxy in zip(places, proxies, strict=True):
            owner[name] = proxy
        try:
            return work()
        finally:
            for owner, name, tensor in places:
                owner[name] = tensor


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}], ids=str)
def test_a_replayed_step_reads_all_from_the_device(
    engine: Engine, bundle: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths, positions, plans and random numbers: a replay that repeated those it was recorded with would differ."""
    expected = engine.generate(PROMPTS, **FREE, **options)
    replay = Traced()
    monkeypatch.setattr("keysieve.compiler.runtimes.torch.runtime.Replay", lambda *_: replay)
    traced = load(bundle)
    make = traced._runtime.session

    def session(*arguments):
        replay.session = make(*arguments)
        return replay.session

    monkeypatch.setattr(traced._runtime, "session", session)
    found = traced.generate(PROMPTS, **FREE, **options)
    assert replay.replays > 100
    assert found == expected and traced.counters == engine.counters


def test_what_a_dense_engine_leaves_out(engine: Engine) -> None:
    evicting, dense = engine._runtime._evicting[0], engine._runtime._dense[0]
    names = [{one.name for one in program.inputs} for program in (evicting, dense)]
    assert names[0] - names[1] == {"budget", "limit", "pinned", "addresses", "centre", "magnitude"}
    assert evicting.operations - dense.operations >= {"keysieve::score_at", "keysieve::select_"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, "no NVIDIA GPU that torch can use"),
        ({"native": True}, "custom ops of ONNX Runtime"),
    ],
    ids=str,
)
def test_what_it_cannot_be_loaded_for(bundle: Path, options: dict[str, object], said: str) -> None:
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=said):
        load(bundle, **options)


def test_a_bundle_of_another_target_is_not_compiled(root: Path) -> None:
    with pytest.raises(EngineError, match="not of the target torch"):
        load(tiny_bundle("llama", EVICTION, root), compiled=True)


@pytest.mark.slow
def test_compiled_by_torch(bundle: Path, engine: Engine) -> None:
    compiled = load(bundle, compiled=True)
    assert compiled.generate(PROMPTS, **FREE) == engine.generate(PROMPTS, **FREE)
    assert compiled.counters == engine.counters
