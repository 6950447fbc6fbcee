"""Many architectures, the whole way: compiled and run against HuggingFace and the masked reference, or refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.pipeline import engine_graph, find
from keysieve.compiler.progress import Progress
from keysieve.compiler.session import Counters
from keysieve.errors import CaptureError, MatchError
from support.families import COMPILED, REFUSED, WINDOW, family_model, pairing_of
from support.masked_reference import MaskedReference
from support.sessions import CHUNK, PROMPT, TOKENS, logits_of
from support.tiny_models import DECODERS, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 2e-4  # of logits up to 4: sums in another order, which layers that carry a state amplify
EVICTION = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMPILED if name not in DECODERS])  # test_session has these
def test_compiled_whole(name: str, tmp_path: Path) -> None:
    model, pairing = family_model(name), pairing_of(name)
    # Without a rotation, there is no series in the distance to score with.
    eviction = replace(EVICTION, policy=PolicyConfig("key-norm")) if pairing == "nope" else EVICTION
    compile(save_model(model, tmp_path / "model"), tmp_path / "bundle", CompileConfig(eviction), QUIET)
    check_attentions_are_one_node(tmp_path / "bundle")
    engine = load(tmp_path / "bundle", threads=1)
    model.set_attn_implementation("eager")  # leaves nothing out: in older transformers sdpa has no softcap
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    # With states the model itself is 2 * ROUNDING from what it gives in float64, and the engine half of ROUNDING.
    rounding = 3 * ROUNDING if engine.manifest["states"] else ROUNDING
    found = logits_of(engine.session(dense=True, capacity=len(TOKENS)))
    np.testing.assert_allclose(found, wanted, atol=rounding, rtol=0)
    assert (found.argmax(-1) == wanted.argmax(-1)).all()

    session = engine.session(capacity=EVICTION.budget + EVICTION.interval + CHUNK)
    found = logits_of(session)
    if not engine.manifest["sizes"]["layers"]:  # nothing to evict: windows alone bound the cache
        np.testing.assert_allclose(found, wanted, atol=rounding, rtol=0)
        rows = {cache.array.shape[2] for cache in session._caches.values()}
        assert rows == {WINDOW - 1 + EVICTION.interval} and max(rows) < len(TOKENS)
        check_torch_engine(tmp_path, eviction, rounding, found, session.counters)
        return
    assert session.counters.rounds[0] >= 3
    check_torch_engine(tmp_path, eviction, rounding, found, session.counters)
    if pairing:
        reference = MaskedReference(model, None, eviction, pairing=pairing)
        expected = [*reference.prefill([TOKENS[:PROMPT]], CHUNK), *reference.decode([TOKENS[PROMPT:]])]
        np.testing.assert_allclose(found, torch.cat(expected).numpy(), atol=1e-3, rtol=0)
        assert session.counters.rounds == reference.rounds
    else:
        evicted = EVICTION.budget + EVICTION.interval
        assert np.abs(found[evicted:] - wanted[evicted:]).max() > 1e-3


def check_torch_engine(
    folder: Path, eviction: EvictionConfig, rounding: float, wanted: np.ndarray, counters: Counters
) -> None:
    """The target torch gives the logits of ONNX Runtime, and does the same to its caches."""
    compile(str(folder / "model"), folder / "torch", CompileConfig(eviction, target="torch"), QUIET)
    session = load(folder / "torch").session(capacity=counters.capacity)
    found = logits_of(session)
    np.testing.assert_allclose(found, wanted, atol=rounding, rtol=0)
    assert session.counters == counters


def check_attentions_are_one_node(bundle: Path) -> None:
    """In the graph for ONNX Runtime: all but those of chunks, whatever caps, sinks and windows they have."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    chunked = [window["chunk"] > 0 for window in manifest["windows"]]
    apart = sum(cache["window"] is not None and chunked[cache["window"]] for cache in manifest["caches"])
    nodes = onnx.load(bundle / "model.onnxruntime.onnx", load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes)
    assert (found["KeySieveAttend"], found["KeySieveUpdate"]) == (len(manifest["caches"]) - apart, apart)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises((MatchError, CaptureError), match=REFUSED[name][1]):
        find(family_model(name), QUIET).require_all()


def test_layers_that_evict_without_rope_want_another_policy() -> None:
    matched = find(family_model("cohere2"), QUIET)
    assert [rope.form.kind for rope in matched.ropes] == ["nope", "nope"]
    assert matched.window_forms[0].kind == "interleaved"
    with pytest.raises(MatchError, match="choose --policy key-norm or streaming"):
        engine_graph(matched, EVICTION, None)
