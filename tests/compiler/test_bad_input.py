"""Bad input: a clear error that says what, where and what to do, and no user file lost or created."""

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from keysieve.compiler import compile as compile_module
from keysieve.compiler.bundle import FORMAT
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.inspect import inspect
from keysieve.compiler.model import load_model
from keysieve.compiler.pipeline import Matched, find
from keysieve.compiler.progress import Progress
from keysieve.errors import (
    BundleError,
    CaptureError,
    ConfigError,
    EngineError,
    ExportError,
    KeySieveError,
    MatchError,
    StatisticsError,
)
from support.bundles import tiny_bundle, tiny_folder, tiny_statistics
from support.tiny_models import POSITIONS, VOCABULARY, save_tiny

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
STREAMING = CompileConfig(replace(SMALL, policy=PolicyConfig("streaming")))
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return tiny_bundle("llama", SMALL, root)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, threads=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@contextmanager
def refused(kind: type[KeySieveError], *parts: str, untouched: Path) -> Iterator[None]:
    """The block raises `kind` with every part in its message, and leaves the folder as it was."""
    before = contents(untouched)
    with pytest.raises(kind) as error:
        yield
    assert type(error.value) is kind
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert contents(untouched) == before


# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_model_without_rope(root: Path, tmp_path: Path) -> None:
    model = tiny_folder("gpt2", root)
    parts = ("none of the 2 attention layers has a rotary embedding", "node attention", "needs a RoPE decoder")
    with refused(MatchError, *parts, untouched=tmp_path):
        compile(model, tmp_path / "bundle", STREAMING, QUIET)
    with refused(MatchError, *parts, untouched=tmp_path):
        calibrate(model, tmp_path / "stats.safetensors", progress=QUIET, gates=False)


def test_an_encoder(root: Path, tmp_path: Path) -> None:
    parts = ("layer 0 (BertSelfAttention)", "attention is not causal", "keysieve needs a decoder")
    verbs: list[Callable[[], Any]] = [
        lambda: compile(tiny_folder("bert", root), tmp_path / "bundle", STREAMING, QUIET),
        lambda: calibrate(tiny_folder("bert", root), tmp_path / "stats.safetensors", progress=QUIET, gates=False),
        lambda: inspect(tiny_folder("bert", root), progress=QUIET),
    ]
    for verb in verbs:
        with refused(CaptureError, *parts, untouched=tmp_path):
            verb()


def test_a_model_folder_without_tokenizer(tmp_path: Path) -> None:
    model = save_tiny("llama_mha", tmp_path / "model", tokenizer=False)
    parts = ("cannot load the tokenizer of", str(model))
    with refused(CaptureError, *parts, untouched=tmp_path):
        compile(model, tmp_path / "bundle", STREAMING, QUIET)
    with refused(CaptureError, *parts, untouched=tmp_path):
        calibrate(model, tmp_path / "stats.safetensors", progress=QUIET, gates=False)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused(CaptureError, "empty", "has no config.json", untouched=tmp_path):
        compile(tmp_path / "empty", tmp_path / "bundle", STREAMING, QUIET)
    with refused(CaptureError, "no such GGUF file", "none.gguf", untouched=tmp_path):
        compile(tmp_path / "none.gguf", tmp_path / "bundle", STREAMING, QUIET)
    with refused(CaptureError, "nobody/nothing", "a folder with config.json", untouched=tmp_path):
        compile("nobody/nothing", tmp_path / "bundle", STREAMING, QUIET)


# -- the statistics ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_found(root: Path) -> Matched:
    return find(load_model(tiny_folder("llama", root)), QUIET)


@pytest.fixture
def captured(llama_found: Matched, monkeypatch: pytest.MonkeyPatch) -> None:
    """compile takes its capture of the tiny llama from here; what these tests refuse comes before any rewrite."""
    monkeypatch.setattr(compile_module, "find", lambda *arguments: llama_found)


@pytest.mark.usefixtures("captured")
def test_statistics_of_another_model(root: Path, tmp_path: Path) -> None:
    config = CompileConfig(SMALL, stats=tiny_statistics("cohere", root))
    parts = ("do not belong to this model", "architecture is 'CohereForCausalLM'", "'LlamaForCausalLM' in the model")
    with refused(StatisticsError, *parts, "keysieve calibrate MODEL -o FILE", untouched=tmp_path):
        compile(tiny_folder("llama", root), tmp_path / "bundle", config, QUIET)


@pytest.mark.usefixtures("captured")
def test_statistics_of_other_weights(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder("llama", root), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = CompileConfig(SMALL, stats=tiny_statistics("llama", root))
    with refused(StatisticsError, "do not belong to this model: weights_sha256", untouched=tmp_path):
        compile(model, tmp_path / "bundle", config, QUIET)


def damaged_statistics(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = load_file(source)
    with safe_open(source, "numpy") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, target, metadata)
    return target


@pytest.mark.usefixtures("captured")
def test_statistics_with_nan(root: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.001.q_mean"][2, 5] = np.nan

    stats = damaged_statistics(tiny_statistics("llama", root), tmp_path / "nan.safetensors", change)
    with refused(StatisticsError, "nan.safetensors", "layer 1: q_mean holds NaN", "calibrate", untouched=tmp_path):
        compile(tiny_folder("llama", root), tmp_path / "bundle", CompileConfig(SMALL, stats=stats), QUIET)


@pytest.mark.usefixtures("captured")
def test_statistics_that_are_no_statistics(root: Path, tmp_path: Path) -> None:
    model = tiny_folder("llama", root)
    (tmp_path / "text").write_text("not tensors")
    with refused(StatisticsError, "text", "no readable safetensors file", untouched=tmp_path):
        compile(model, tmp_path / "bundle", CompileConfig(SMALL, stats=tmp_path / "text"), QUIET)
    with refused(StatisticsError, "none.safetensors", "no such file", untouched=tmp_path):
        compile(model, tmp_path / "bundle", CompileConfig(SMALL, stats=tmp_path / "none.safetensors"), QUIET)


@pytest.mark.parametrize("name", ["none.txt", "latin.txt", "empty.txt"])
def test_a_text_that_cannot_be_read(name: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 500)
    (tmp_path / "empty.txt").write_text("")
    parts = {
        "none.txt": ("there is no text file", "none.txt", "give the path"),
        "latin.txt": ("latin.txt is not a UTF-8 text", "convert it to UTF-8"),
        "empty.txt": ("the text holds no tokens", "give a longer one"),
    }[name]
    with refused(ConfigError, *parts, untouched=tmp_path):
        calibrate(tiny_folder("llama_mha", root), tmp_path / "stats", [tmp_path / name], progress=QUIET, gates=False)


# -- options -----------------------------------------------------------------------------------------------------------


def test_an_unknown_policy(tmp_path: Path) -> None:
    with refused(ConfigError, "unknown policy 'h2o'", "triattention, streaming, key-norm, random", untouched=tmp_path):
        PolicyConfig("h2o")


def test_a_budget_that_leaves_no_choice(engine: Engine, tmp_path: Path) -> None:
    with refused(ConfigError, "budget 132", "sinks 4 + recent 128", "above 132", untouched=tmp_path):
        EvictionConfig(PolicyConfig("triattention"), budget=132)
    for options in ({"budget": 10}, {"budget": [48, 9]}):
        with refused(EngineError, "leaves no row to choose", "give a budget above 10", untouched=tmp_path):
            engine.generate([[3, 4], [5]], max_new_tokens=100, **options)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_a_pinned_budget(engine: Engine, tmp_path: Path) -> None:
    parts = ("a pinned prompt of 40 tokens and 8 recent rows", "a budget of 48 rows", "above 48", "evictable")
    with refused(EngineError, *parts, untouched=tmp_path):
        engine.generate([5] * 40, max_new_tokens=4, prompt="pinned")
    engine.generate([5] * 39, max_new_tokens=4, prompt="pinned")
    with refused(EngineError, "unknown prompt mode 'kept'", "evictable or pinned", untouched=tmp_path):
        engine.generate([5], prompt="kept")


def test_a_chunk_or_capacity_that_does_not_fit(engine: Engine, tmp_path: Path) -> None:
    long = [5] * 200
    parts = ("capacity 64 is too small", "a budget of 48 rows with chunks of 30 tokens", "needs 78", "smaller budget")
    with refused(EngineError, *parts, untouched=tmp_path):
        engine.generate(long, capacity=64, chunk=30)
    with refused(EngineError, "capacity 63 is too small", "interval 16 needs 64", untouched=tmp_path):
        engine.generate(long, capacity=63)
    with refused(EngineError, "capacity 203 is too small", "204 tokens without eviction", untouched=tmp_path):
        engine.generate(long, max_new_tokens=4, capacity=203, dense=True)
    session = engine.session()
    session.step(np.array([[5] * 50]), np.array([50]), np.zeros((1, 1), int))
    with refused(EngineError, "a step of 15 tokens", "50 rows are held", "capacity is 64", untouched=tmp_path):
        session.step(np.array([[5] * 15]), np.array([15]), np.zeros((1, 1), int))


@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_below_one(engine: Engine, tmp_path: Path, chunk: int) -> None:
    with refused(EngineError, f"chunk is {chunk}", untouched=tmp_path):
        engine.generate([5] * 20, max_new_tokens=2, chunk=chunk)


def test_budgets_that_are_not_one_a_sequence(engine: Engine, tmp_path: Path) -> None:
    with refused(EngineError, "2 budgets", "3 prompts", untouched=tmp_path):
        engine.generate([[5], [6], [7]], max_new_tokens=2, budget=[40, 48])


def test_positions_past_the_models_limit(engine: Engine, tmp_path: Path) -> None:
    parts = (f"{POSITIONS + 1} positions", f"the model was made for {POSITIONS}", "ignore_position_limit")
    with refused(EngineError, *parts, untouched=tmp_path):
        engine.generate([5] * (POSITIONS - 9), max_new_tokens=10)
    stream = engine.stream([5] * (POSITIONS - 9), max_new_tokens=10, ignore_position_limit=True, chunk=2048)
    assert next(stream).tokens[0] is not None


def test_a_prompt_without_tokens_or_outside_the_vocabulary(engine: Engine, tmp_path: Path) -> None:
    for prompts in ("", [], [[5], []], ["text", ""]):
        with refused(EngineError, "prompt is empty; give at least one token", untouched=tmp_path):
            engine.generate(prompts)
    for token in (VOCABULARY, -1):
        with refused(EngineError, f"token {token} is outside", f"vocabulary of {VOCABULARY}", untouched=tmp_path):
            engine.generate([5, token])
    with refused(EngineError, "max_new_tokens is 0", "at least one", untouched=tmp_path):
        engine.generate([5], max_new_tokens=0)


def test_errors_come_before_the_first_step(engine: Engine) -> None:
    with pytest.raises(EngineError):
        engine.stream([5] * 200, capacity=20)  # not at the first next()


def test_a_bundle_without_tokenizer_or_template(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    for file in [*copy.glob("tokenizer*"), *copy.glob("*.jinja")]:
        file.unlink()
        manifest["files"].pop(file.name)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    bare = load(copy, threads=1)
    with refused(EngineError, "bundle has no tokenizer", "give token ids instead of text", untouched=tmp_path):
        bare.generate("text")
    found = bare.generate([5, 6], max_new_tokens=3, stop_tokens=[])[0]
    assert len(found.tokens) == 3 and found.text == ""


def test_chat_without_a_template(bundle: Path, tmp_path: Path) -> None:
    engine = load(bundle, threads=1)
    engine.tokenizer.chat_template = None
    with refused(EngineError, "has no chat template", "leave chat out", untouched=tmp_path):
        engine.generate("text", chat=True)


def test_threads_below_one(bundle: Path, tmp_path: Path) -> None:
    with refused(EngineError, "threads is 0", "at least 1", untouched=tmp_path):
        load(bundle, threads=0)


# -- output ------------------------------------------------------------------------------------------------------------


def test_an_output_folder_that_exists(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "load_model", lambda *arguments: pytest.fail("work began"))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("mine")
    with refused(BundleError, "bundle exists already", "choose another name", untouched=tmp_path):
        compile(tiny_folder("llama", root), tmp_path / "bundle", STREAMING, QUIET)


def test_a_full_disk_at_export(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(graph: object, path: Path, *rest: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compile_module, "export_onnx", export)
    parts = ("cannot write", "bundle", "No space left on device", "nothing was left behind")
    with refused(BundleError, *parts, untouched=tmp_path):
        compile(tiny_folder("llama_mha", root), tmp_path / "bundle", STREAMING, QUIET)


@pytest.mark.parametrize("largest", [100_000, 8_000])  # stops at the weights, and at the tokenizer
def test_files_that_cannot_be_written(
    largest: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real failing writes: the process may write files of `largest` bytes only."""
    model = tiny_folder("llama_mha", root)
    if largest < 100_000:  # so that later files are reached
        monkeypatch.setattr(
            compile_module, "export_onnx", lambda graph, path, *rest: path.write_bytes(b"graph") and None
        )
        monkeypatch.setattr(compile_module, "export_for_onnxruntime", lambda *paths: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises((BundleError, ExportError, StatisticsError)) as error:
            compile(model, tmp_path / "bundle", STREAMING, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), ("model.onnx.data has", "truncated or altered")),
        (lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]), ("model.onnx.data was altered", "SHA-256")),
        (lambda file: file.unlink(), ("model.onnx.data is missing", "compile the bundle again")),
    ],
)
def test_a_damaged_bundle(
    damage: Callable[[Path], object], parts: tuple[str, ...], bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    damage(copy / "model.onnx.data")
    with refused(BundleError, *parts, untouched=tmp_path):
        load(copy)


def test_a_bundle_of_another_version(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    parts = ("bundle format 1", f"this keysieve reads format {FORMAT}", "compile the model again")
    with refused(BundleError, *parts, untouched=tmp_path):
        load(copy)


@pytest.mark.parametrize(("name", "native"), [("model.onnx", False), ("model.onnxruntime.onnx", True)])
def test_a_graph_that_the_runtime_cannot_load(name: str, native: bool, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    content = b"no graph"
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / name).write_bytes(content)
    with refused(BundleError, f"{name}: ONNX Runtime cannot load it", untouched=tmp_path):
        load(copy, native=native)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda manifest: manifest["eviction"].pop("interval"), "eviction is damaged: it lacks interval"),
        (lambda manifest: manifest["eviction"]["policy"].update(name="foo"), "eviction is damaged: unknown policy"),
        (lambda manifest: manifest["eviction"].update(policy=["sieve"]), "eviction is damaged"),
        (lambda manifest: manifest.update(target="foo"), "is of target 'foo', which this keysieve does not know"),
        (lambda manifest: manifest["files"].pop("model.onnx"), "lacks model.onnx; compile the bundle again"),
        (lambda manifest: manifest.update(target="torch"), "lacks program.json, model.safetensors"),
    ],
    ids=("interval", "policy name", "policy", "target", "model", "program"),
)
def test_a_bundle_that_lacks_what_its_target_needs(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=said):
        load(copy)
