"""Layers that evict with different shapes, the whole way: calibrated, compiled, run, against both references."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import PreTrainedModel

from keysieve.compiler import statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.progress import Progress
from support.families import HEADS_OF_16, family
from support.layer_rope import LayerRope
from support.masked_reference import MaskedReference, Statistics
from support.mixed_heads import LAYERS, mixed_heads, mixed_ropes
from support.sessions import CHUNK, PROMPT, TOKENS, logits_of
from support.tiny_models import save_model, seeded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CALIBRATED = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
ONLINE = replace(CALIBRATED, policy=PolicyConfig("triattention", centres="online"), scope="per_head")
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(mixed_heads(), tmp_path_factory.mktemp("mixed") / "model")


@pytest.fixture(scope="module")
def statistics(folder: Path) -> Path:
    calibrate(folder, folder.parent / "stats.safetensors", max_tokens=1024, chunk=256, progress=QUIET, gates=False)
    return folder.parent / "stats.safetensors"


@pytest.fixture(scope="module")
def calibrated(folder: Path, statistics: Path) -> Path:
    compile(folder, folder.parent / "calibrated", CompileConfig(CALIBRATED, stats=statistics), QUIET)
    return folder.parent / "calibrated"


def check_dense(engine: Engine, model: PreTrainedModel) -> None:
    """Without eviction, the engine is the model."""
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    found = logits_of(engine.session(dense=True, capacity=len(TOKENS)))
    np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=0)
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


def check_evicting(
    engine: Engine,
    model: PreTrainedModel,
    eviction: EvictionConfig,
    centres: Statistics | None = None,
    ropes: list[LayerRope] | None = None,
) -> None:
    """With it, the engine is the reference that masks."""
    pairing = None if ropes else "half_split"
    reference = MaskedReference(model, centres, eviction, pairing=pairing, ropes=ropes)
    session = engine.session(capacity=eviction.budget + eviction.interval + CHUNK)
    found = logits_of(session)
    expected = [*reference.prefill([TOKENS[:PROMPT]], CHUNK), *reference.decode([TOKENS[PROMPT:]])]
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), atol=1e-3, rtol=0)
    assert session.counters.rounds == reference.rounds and reference.rounds[0] >= 3
    assert (session.counters.rows_held, session.counters.rows_evicted) == (reference.rows_held, reference.rows_evicted)


def test_calibrated_centres(calibrated: Path, statistics: Path) -> None:
    engine, model = load(calibrated, threads=1), mixed_heads()
    check_dense(engine, model)
    centres = [(layer.q_mean, layer.q_abs) for layer in statistics_file.load(statistics).layers]
    assert [mean.shape for mean, _ in centres] == [(heads.query, heads.dim) for heads in LAYERS]
    check_evicting(engine, model, CALIBRATED, centres, mixed_ropes(model))


def test_online_centres(tmp_path: Path) -> None:
    model = mixed_heads((LAYERS[0], LAYERS[2], LAYERS[5]))
    compile(save_model(model, tmp_path / "model"), tmp_path / "bundle", CompileConfig(ONLINE), QUIET)
    check_evicting(load(tmp_path / "bundle", threads=1), model, ONLINE, None, mixed_ropes(model))


def test_what_the_bundle_says(calibrated: Path) -> None:
    manifest = load(calibrated, threads=1).manifest
    shapes = [(2, 2), (1, 3), (1, 1), (1, 2), (1, 2)]
    assert manifest["plans"] == {
        f"plan_{index}": {"layers": layers, "kv_heads": heads, "class": 0}
        for index, (layers, heads) in enumerate(shapes)
    }
    assert manifest["nodes"] == {"KeySieveUpdate": 6, "KeySieveScore": 5, "KeySieveSelect": 5}
    assert manifest["sizes"]["kv_heads"] == manifest["model"]["kv_heads"] == [2, 3, 1, 2, 2, 2]
    rows = [heads.kv * (heads.dim + heads.value_dim) for heads in LAYERS]
    assert inspect(calibrated).kv_bytes_per_token == 4 * sum(rows)
    graph = onnx.load(calibrated / "model.onnx", load_external_data=False)
    functions = [(function.name, function.overload) for function in graph.functions]
    per_group = [(name, str(group)) for group in range(5) for name in ("KeySieveScore", "KeySieveSelect")]
    assert sorted(functions) == sorted([("KeySieveUpdate", ""), *per_group])


def test_laguna_whose_layers_differ_in_query_heads(tmp_path: Path) -> None:
    heads: dict = {"num_attention_heads_per_layer": [4, 8], "mlp_layer_types": ["dense"] * 2}
    model = seeded(family("Laguna", **HEADS_OF_16, **heads, num_hidden_layers=2))
    eviction = replace(ONLINE, scope="union")
    compile(save_model(model, tmp_path / "model"), tmp_path / "bundle", CompileConfig(eviction), QUIET)
    engine = load(tmp_path / "bundle", threads=1)
    assert engine.manifest["sizes"]["query_heads"] == [4, 8] and engine.manifest["sizes"]["kv_heads"] == 2
    check_dense(engine, model)
    check_evicting(engine, model, eviction)
