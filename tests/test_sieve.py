"""Policy sieve, the whole way: compiled with gates, run on every runtime, against the reference that masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler import statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.runtimes.torch import memory
from keysieve.errors import ConfigError, MatchError, StatisticsError
from support.families import family_model
from support.head_shares import random_shares, with_shares
from support.layer_rope import layer_ropes
from support.masked_reference import MaskedReference
from support.tiny_models import save_model
from test_head_classes import CHUNK, QUIET, TEXT, logits, of_heads, starting_centres

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KEPT = EvictionConfig(
    PolicyConfig("sieve", terms=("trig", "gate")), budget=56, interval=16, sinks=2, recent=8, heads="uniform"
)
CLASSES = replace(KEPT, heads="classes", head_classes=3)
GATE_ALONE = replace(KEPT, policy=PolicyConfig("sieve", terms=("gate",)))
# Plain heads; norms of queries and experts; sinks and windows beside; interleaved pairs.
PAIRINGS = {"mistral": "half_split", "qwen3_moe": "half_split", "gpt_oss": "half_split", "glm": "interleaved"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sieve")


def statistics(folder: Path, name: str) -> Path:
    """Of that family, with random gates and shares, beside the model."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        model = save_model(family_model(name), folder / f"{name}.model")
        calibrate(model, file, max_tokens=256, chunk=256, progress=QUIET, gates=False)
        found, generator = statistics_file.load(file), np.random.default_rng(3)
        heads = next(layer.kv_heads for layer in inspect(model).layers if layer.kind == "full")
        width = family_model(name).config.hidden_size
        gated = [
            replace(
                layer,
                gate_weight=generator.normal(0, width**-0.5, (heads, width)).astype(np.float32),
                gate_bias=generator.normal(size=heads).astype(np.float32),
                gate_fit=np.ones(heads, np.float32),
            )
            for layer in found.layers
        ]
        shared = with_shares(replace(found, layers=gated), random_shares(len(gated), heads), [32, 64])
        statistics_file.save(shared, file)
    return file


def bundle(folder: Path, name: str, eviction: EvictionConfig, **options: str) -> Path:
    stats, terms = statistics(folder, name), "+".join(eviction.policy.terms or ("all",))
    made = folder / "-".join([name, terms, str(eviction.heads), *options.values()])
    if not made.exists():
        compile(folder / f"{name}.model", made, CompileConfig(eviction, stats=stats, **options), QUIET)
    return made


def reference(folder: Path, name: str, eviction: EvictionConfig, engine: Engine) -> MaskedReference:
    stats = statistics_file.load(statistics(folder, name))
    start = starting_centres(statistics(folder, name), layer_ropes(family_model(name), PAIRINGS[name]))
    gates = [(layer.gate_weight, layer.gate_bias) for layer in stats.layers]
    classes = of_heads(engine) if eviction.heads == "classes" else None
    return MaskedReference(family_model(name), start, eviction, pairing=PAIRINGS[name], classes=classes, gates=gates)


@pytest.mark.parametrize("name", PAIRINGS)
@pytest.mark.parametrize("eviction", [KEPT, CLASSES, GATE_ALONE], ids=["uniform", "classes", "gate alone"])
def test_the_engine_is_the_reference(folder: Path, name: str, eviction: EvictionConfig) -> None:
    engine = load(bundle(folder, name, eviction), threads=1)
    found, session = logits(engine)
    expected = reference(folder, name, eviction, engine)
    steps = [TEXT[at : at + CHUNK] for at in range(0, 96, CHUNK)] + [[token] for token in TEXT[96:]]
    wanted = torch.cat([expected.feed([tokens])[0] for tokens in steps]).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)
    assert session.counters.rounds[0] >= 4


def test_sequences_of_a_batch_are_as_alone(folder: Path) -> None:
    engine = load(bundle(folder, "mistral", CLASSES), threads=1)
    prompts, options = [TEXT[:100], TEXT[20:75], TEXT[40:180]], {"max_new_tokens": 60, "stop_tokens": []}
    together = engine.generate(prompts, **options)
    assert together == [engine.generate([prompt], **options)[0] for prompt in prompts]


@pytest.mark.parametrize("runtime", ["functions", "inlined", "torch"])
def test_every_runtime_gives_the_same(folder: Path, runtime: str) -> None:
    wanted, _ = logits(load(bundle(folder, "mistral", CLASSES), threads=1))
    if runtime == "torch":
        engine = load(bundle(folder, "mistral", CLASSES, target="torch"))
    elif runtime == "inlined":
        compile(
            folder / "mistral.model",
            folder / "inlined",
            CompileConfig(CLASSES, stats=statistics(folder, "mistral"), inline=True),
            QUIET,
        )
        engine = load(folder / "inlined", threads=1)
    else:
        engine = load(bundle(folder, "mistral", CLASSES), threads=1, native=False)
    np.testing.assert_allclose(logits(engine)[0], wanted, atol=1e-4, rtol=0)


# Windows, chunks, linear attention, state space beside what evicts.
@pytest.mark.parametrize("name", ["gemma3", "llama4", "qwen3_next", "granitemoehybrid"])
def test_hybrids_are_the_same_on_every_runtime(folder: Path, name: str) -> None:
    made = bundle(folder, name, CLASSES)
    wanted, session = logits(load(made, threads=1))
    assert session.counters.rounds[0] >= 4
    assert session.counters.rows_held[0] + session.counters.rows_evicted[0] == len(TEXT)
    for engine in (load(made, threads=1, native=False), load(bundle(folder, name, CLASSES, target="torch"))):
        found, other = logits(engine)
        np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)
        assert other.counters == session.counters


def test_rows_know_their_tokens(folder: Path) -> None:
    engine = load(bundle(folder, "mistral", KEPT), threads=1)
    _, session = logits(engine)
    tokens, rows = session._caches["token"].array[..., 0], int(session.rows[0])
    keep = int(session._now["keep"].array[0])
    held = tokens[:, :, : int(session._now["length"].array[0])]
    assert keep < 0 or keep == rows
    assert (np.diff(held, axis=-1) > 0).all() and held[..., -1].max() == len(TEXT) - 1
    assert (held[..., : KEPT.sinks] == np.arange(KEPT.sinks)).all()
    assert session.counters.forgotten == [pytest.approx(1 - len(np.unique(held)) / len(TEXT))]
    assert 0.1 < session.counters.forgotten[0] < 0.9
    layers, heads, _ = held.shape
    assert session.counters.heads == layers * heads == max(session.counters.holders[0])
    assert sum(session.counters.holders[0]) == held.size
    torch_engine = load(bundle(folder, "mistral", KEPT, target="torch"))
    other = logits(torch_engine)[1]
    assert other.counters.holders == session.counters.holders
    sizes = {"batch": 1, "capacity": other.capacity, "vocabulary": torch_engine.manifest["vocab_size"]}
    assert memory.needed(other._program, sizes)["keys and values"] == other.kv_bytes == session.counters.kv_bytes


def test_without_gates_it_says_what_to_do(folder: Path) -> None:
    plain = folder / "plain.safetensors"
    stats = statistics_file.load(statistics(folder, "mistral"))
    layers = [replace(layer, gate_weight=None, gate_bias=None, gate_fit=None, share=None) for layer in stats.layers]
    statistics_file.save(replace(stats, layers=layers, learned=None), plain)
    with pytest.raises(
        StatisticsError, match="the term gate needs gates, which these statistics lack; `keysieve calibrate"
    ):
        compile(folder / "mistral.model", folder / "none", CompileConfig(KEPT, stats=plain), QUIET)
    with pytest.raises(ConfigError, match="the term gate needs the gates of a statistics file"):
        CompileConfig(KEPT)
    with pytest.raises(ConfigError, match="the gate is not on tensorrt-rtx yet"):
        CompileConfig(KEPT, stats=plain, target="tensorrt-rtx")


def test_what_the_statistics_lack_is_left_out(folder: Path) -> None:
    default = replace(CLASSES, policy=PolicyConfig(), heads=None)
    stats = statistics_file.load(statistics(folder, "mistral"))
    chosen, reasons = [], []
    for left_out in ((), ("share",), ("share", "gate_weight", "gate_bias", "gate_fit")):
        file = folder / "lacking.safetensors"
        layers = [replace(layer, **dict.fromkeys(left_out)) for layer in stats.layers]
        learned = replace(stats.learned, budgets=[], share_context=0, texts=0) if left_out else stats.learned
        statistics_file.save(replace(stats, layers=layers, learned=learned if len(left_out) < 2 else None), file)
        report = compile(
            folder / "mistral.model", folder / "-", CompileConfig(default, stats=file), QUIET, dry_run=True
        )
        chosen.append((report.eviction["policy"]["terms"], report.eviction["heads"]))
        reasons.append(report.without)
    assert not reasons[0] and list(reasons[1]) == ["without shares"]
    assert all("these statistics lack them; `keysieve calibrate" in why for why in reasons[2].values())
    assert chosen == [(("trig", "gate"), "classes"), (("trig", "gate"), "uniform"), (("trig",), "uniform")]
    config = CompileConfig(default, target="tensorrt-rtx", stats=statistics(folder, "mistral"))
    report = compile(folder / "mistral.model", folder / "-", config, QUIET, dry_run=True)
    assert (report.eviction["policy"]["terms"], report.eviction["heads"]) == (("trig",), "uniform")
    assert set(report.without.values()) == {"tensorrt-rtx takes none yet"}
    report = compile(folder / "mistral.model", folder / "-", CompileConfig(default), QUIET, dry_run=True)
    assert (report.eviction["policy"]["terms"], report.eviction["heads"]) == (("trig",), "uniform")
    assert set(report.without.values()) == {"there are no statistics; `keysieve calibrate MODEL -o FILE` learns them"}


def test_layers_without_a_common_input_are_named(folder: Path) -> None:
    model, stats = save_model(family_model("deepseek_v3"), folder / "mla"), folder / "mla.safetensors"
    calibrate(model, stats, max_tokens=256, chunk=256, progress=QUIET, gates=False)
    never = r"this model can have no(ne| gates): layer 0, node .*: query, key and value are projected "
    with pytest.raises(MatchError, match=f"{never}.*; choose --terms trig"):
        compile(model, folder / "mla.bundle", CompileConfig(KEPT, stats=stats), QUIET)
    trig = PolicyConfig(terms=("trig",))
    with pytest.raises(ConfigError, match=f"need shares of the heads: {never}.*, or leave --heads out"):
        compile(model, folder / "mla.bundle", CompileConfig(replace(CLASSES, policy=trig), stats=stats), QUIET)
    default = replace(CLASSES, policy=PolicyConfig(), heads=None)
    report = compile(model, folder / "mla.bundle", CompileConfig(default, stats=stats), QUIET)
    assert list(report.without) == ["without gates", "without shares"]
    assert inspect(folder / "mla.bundle").without == report.without
