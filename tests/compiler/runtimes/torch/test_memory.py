"""What a session takes: the bytes that it allocates, counted before, and refused where they are not free."""

from pathlib import Path

import pytest

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.runtimes.torch import memory
from keysieve.errors import EngineError
from support.bundles import tiny_bundle

EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_counted_is_what_a_session_holds(root: Path, dense: bool) -> None:
    engine = load(tiny_bundle("llama", EVICTION, root, target="torch"))
    session = engine.session(3, capacity=64, dense=dense)
    program = session._program
    vocabulary = engine.manifest["vocab_size"]
    parts = memory.needed(program, {"batch": 3, "capacity": 64, "vocabulary": vocabulary})
    assert parts["keys and values"] == session.kv_bytes == session.counters.kv_bytes
    held = sum(tensor.nbytes for tensor in session._held.values())
    of_a_step = 2 * 3 * 8  # input_ids and logits_at
    assert sum(parts[name] for name in ("keys and values", "plans", "states")) == held + of_a_step
    assert parts["logits"] == 3 * vocabulary * 4
    assert parts["scores"] == (0 if dense else 3 * 4 * 3 * 64 * 4)  # layers, query heads, batch, rows


def test_more_than_is_free_is_refused_with_the_arithmetic() -> None:
    parts = {"keys and values": 30_000_000_000, "plans": 400_000_000, "states": 0}
    memory.check(parts, 32_000_000_000, 8)
    with pytest.raises(EngineError, match=r"8 sequences need 31.92 GB.*values 30.00 \+ plans 0.40 GB.*31.00 GB"):
        memory.check(parts, 31_000_000_000, 8)


def test_a_cpu_is_asked_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny_bundle("llama", EVICTION, root, target="torch"))
    monkeypatch.setattr(memory, "free_memory", lambda: 1_000_000)
    with pytest.raises(EngineError, match=r"sequences need .* GB are free; ask for fewer sequences"):
        engine.generate([5, 6], max_new_tokens=4, capacity=100_000)
