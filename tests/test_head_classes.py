"""Heads with budgets of their own, the whole way: compiled, run, against the reference that masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler import statistics_file
from keysieve.compiler.bundle import open_bundle
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.progress import Progress
from support.families import family_model
from support.head_shares import random_shares, save_shares
from support.layer_rope import LayerRope, layer_ropes
from support.masked_reference import MaskedReference
from support.sessions import CHUNK
from support.tiny_models import VOCABULARY, save_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KEPT = EvictionConfig(PolicyConfig("triattention", centres="online"), budget=56, interval=16, sinks=2, recent=8)
CLASSES = replace(KEPT, heads="classes", head_classes=3)
QUIET = Progress(quiet=True)
# Plain heads; norms of queries and experts; sinks and windows beside; interleaved pairs; keys made of latents.
FAMILIES = ("mistral", "qwen3_moe", "gpt_oss", "glm", "deepseek_v3")
TEXT = torch.randint(3, VOCABULARY, (180,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


def bundle(folder: Path, name: str, eviction: EvictionConfig = CLASSES, **options: str) -> Path:
    """Of that family, with random shares."""
    made = folder / "-".join([name, eviction.heads, str(eviction.head_classes), *map(str, options.values())])
    if not made.exists():
        model, stats = folder / f"{name}.model", folder / f"{name}.safetensors"
        if not model.exists():
            save_model(family_model(name), model)
            calibrate(
                model, folder / f"{name}.plain.safetensors", max_tokens=256, chunk=256, progress=QUIET, gates=False
            )
            plain = folder / f"{name}.plain.safetensors"
            found = inspect(model).layers
            evicting = [layer for layer in found if layer.kind == "full"]
            save_shares(plain, stats, random_shares(len(evicting), evicting[0].kv_heads), [32, 64])
        compile(model, made, CompileConfig(eviction, stats=stats, **options), QUIET)
    return made


def of_heads(engine: Engine) -> tuple[list[list[int]], list[int]]:
    """The class of every KV head by layer, and the budget of each class, as the bundle says."""
    caches = [cache for cache in engine.manifest["caches"] if cache["window"] is None]
    found: dict[int, dict[int, int]] = {}
    for cache in caches:
        found.setdefault(cache["layer"], {}).update(dict.fromkeys(cache["heads"], cache["class"]))
    budgets = engine.session()._rows.budgets[:, 0].tolist()
    return [[heads[head] for head in sorted(heads)] for heads in found.values()], budgets


def starting_centres(file: Path, ropes: list[LayerRope]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The mean queries, with pairs where the reference has them: a model may move them before it rotates."""
    found = []
    for layer, rope in zip(statistics_file.load(file).layers, ropes, strict=True):
        mean = layer.q_mean.copy()
        real, imaginary = layer.rope.pairs
        mean[:, rope.first], mean[:, rope.second] = layer.q_mean[:, real], layer.q_mean[:, imaginary]
        found.append((mean, layer.q_abs))
    return found


def logits(engine: Engine) -> tuple[np.ndarray, object]:
    """Of TEXT, in chunks and then token by token."""
    session = engine.session(capacity=KEPT.budget + KEPT.interval + CHUNK)
    steps = [TEXT[at : at + CHUNK] for at in range(0, 96, CHUNK)] + [[token] for token in TEXT[96:]]
    found = []
    for tokens in steps:
        count = np.array([len(tokens)], np.int32)
        found.append(session.step(np.array([tokens]), count, np.arange(len(tokens))[None], CHUNK)[0].copy())
    return np.concatenate(found), session


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_is_the_reference(folder: Path, name: str) -> None:
    engine = load(bundle(folder, name), threads=1)
    found, session = logits(engine)
    classes, budgets = of_heads(engine)
    assert len(set(budgets)) > 1
    pairing = {"glm": "interleaved", "deepseek_v3": "half_split, last"}.get(name, "half_split")
    start = starting_centres(folder / f"{name}.safetensors", layer_ropes(family_model(name), pairing))
    reference = MaskedReference(family_model(name), start, KEPT, pairing=pairing, classes=(classes, budgets))
    steps = [TEXT[at : at + CHUNK] for at in range(0, 96, CHUNK)] + [[token] for token in TEXT[96:]]
    expected = torch.cat([reference.feed([tokens])[0] for tokens in steps]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    assert reference.rounds[0] >= 4 and session.counters.rounds == reference.rounds
    rows = session.rows_of_classes[:, 0]
    held = {each: len(reference.kept(layer, head)) for layer, of in enumerate(classes) for head, each in enumerate(of)}
    assert held == dict(enumerate(rows.tolist()))


@pytest.mark.parametrize("options", [{"target": "torch"}, {"inline": True}], ids=str)
def test_every_runtime_draws_the_same_tokens(folder: Path, options: dict[str, object]) -> None:
    prompts = [TEXT[:100], TEXT[5:17], TEXT[20:150]]
    asked = {"max_new_tokens": 60, "stop_tokens": [], "chunk": 16}
    engines = [load(bundle(folder, "mistral"), threads=1), load(bundle(folder, "mistral", **options), threads=1)]
    ours, theirs = ([one.tokens for one in engine.generate(prompts, **asked)] for engine in engines)
    assert ours == theirs and engines[0].counters == engines[1].counters
    assert min(engines[0].counters.rounds) >= 1 and max(engines[0].counters.rounds) >= 4


def test_native_ops_and_function_bodies_agree(folder: Path) -> None:
    native, bodies = (load(bundle(folder, "gpt_oss"), threads=1, native=native) for native in (True, False))
    np.testing.assert_allclose(logits(native)[0], logits(bodies)[0], atol=1e-4, rtol=0)


def test_bytes_are_those_of_uniform_heads(folder: Path) -> None:
    classes, plain = (load(bundle(folder, "mistral", which), threads=1) for which in (CLASSES, KEPT))
    sizes = [engine.session().counters.kv_bytes for engine in (classes, plain)]
    assert abs(sizes[0] / sizes[1] - 1) <= 0.02


def test_what_the_bundle_says(folder: Path) -> None:
    path = bundle(folder, "mistral")
    manifest = open_bundle(path).manifest
    heads = {(cache["layer"], head) for cache in manifest["caches"] for head in cache["heads"]}
    assert heads == {(layer, head) for layer in range(3) for head in range(2)}
    assert sum(each["kv_heads"] for each in manifest["classes"]) == 6
    caches = inspect(path).to_json()["caches"]
    assert {tuple(cache) for cache in caches} == {("layer", "kv_heads", "share", "rows")}
    assert abs(sum(len(cache["kv_heads"]) * cache["rows"] for cache in caches) / (6 * KEPT.budget) - 1) < 0.02


def test_one_class_is_uniform(folder: Path) -> None:
    one = replace(CLASSES, head_classes=1)
    engines = [load(bundle(folder, "mistral", which), threads=1) for which in (one, KEPT)]
    first, second = (logits(engine)[0] for engine in engines)
    assert (first == second).all()
