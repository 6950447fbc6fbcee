"""Learning on a tiny model: gates and shares, in one go, interrupted, by two, and layer by layer."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from keysieve.compiler import calibrate as module
from keysieve.compiler import head_shares, learn, learning_texts, statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.pipeline import Matched, find, tap_graph
from keysieve.compiler.progress import Progress
from keysieve.compiler.statistics import Statistics
from keysieve.errors import ConfigError, StatisticsError
from support.bundles import tiny_folder
from support.families import family_model
from support.threads import Threads
from support.tiny_models import TEXT, save_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"CONTEXTS": 6, "HELD_OUT": 2, "CONTEXT_TOKENS": 48, "TEXTS": 2, "APART": 1, "BUDGETS": (190, 260)}
    for name, value in few.items():
        monkeypatch.setattr(learning_texts, name, value)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Row {n}: {TEXT[n % 50 : n % 50 + 60]}\n" for n in range(60)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def llama(root: Path) -> Iterator[Path]:
    """A model that is captured and tapped once for all tests here, since each capture costs seconds."""
    graphs: dict[Any, Matched] = {}

    def find_once(model: Any, progress: Progress) -> Matched:
        key = type(model), next(model.parameters()).is_meta  # a graph without weights is another one
        if key not in graphs:
            graphs[key] = find(model, progress)
            tap_graph(graphs[key], learn=True)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find", find_once)
        patch.setattr(module, "tap_graph", lambda matched, learn=False: matched.graph)
        yield tiny_folder("llama", root)


def learned(model: Path, path: Path, text: Path, **options) -> Statistics:
    return calibrate(model, path, [text], 1200, 256, QUIET, **{"gates": True, "context": 600} | options)


@pytest.fixture
def whole(llama: Path, text: Path, tmp_path: Path) -> Statistics:
    return learned(llama, tmp_path / "whole", text)


def same(found: Statistics, wanted: Statistics, tolerance: float = 1e-5) -> None:
    for a, b in zip(found.layers, wanted.layers, strict=True):
        for name in statistics_file.LEARNED:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance)


def test_gates_and_shares_are_in_the_file(whole: Statistics, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "whole")
    assert not any("sum_" in name for name in tensors)
    shares = np.concatenate([tensors[f"layers.{layer:03d}.share"] for layer in range(3)], 1)
    assert shares.shape == (2, 6) and shares.dtype == np.float32
    np.testing.assert_allclose(shares.mean(1), 1, rtol=1e-6)
    assert (shares * np.array([[190], [260]]) >= head_shares.FLOOR - 1e-3).all() and shares.max() > 1.02
    assert tensors["layers.001.gate_weight"].shape == (2, 64) and tensors["layers.001.gate_bias"].shape == (2,)
    with safe_open(tmp_path / "whole", "np") as file:
        header = json.loads(file.metadata()["statistics"])
        assert file.metadata()["version"] == "3"
    assert (header["share_budgets"], header["share_context"]) == ([190, 260], 600)
    assert header["gate_correlation"].keys() == {"0", "1", "2"} and header["learned"]["seed"] == 1
    same(statistics_file.load(tmp_path / "whole"), whole, 0)


def test_the_gates_are_ridge_regression_on_what_hooks_see(whole: Statistics, text: Path) -> None:
    """From transformers' own forward pass with eager attention, which returns its probabilities."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    ids = tiny_tokenizer()(text.read_text())["input_ids"][:1200]
    plan = replace(whole.learned, sums={})
    texts = learning_texts.learning_texts(lambda: iter([text.read_text()]), tiny_tokenizer(), len(ids), plan)
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    rows, labels = [], []
    for context in texts.contexts[:6]:
        with torch.no_grad():
            paid = model(torch.tensor([context]), output_attentions=True).attentions[1][0]  # [Hq,S,S]
        most = paid[:, texts.repeats :, :48].amax(1).reshape(2, 2, 48).amax(1)
        rows.append(seen.pop()[0, 4:48])
        labels.append(torch.log(1e-6 + most.T)[4:])
    x, y = torch.cat(rows).double().numpy(), torch.cat(labels).double().numpy()
    x = np.column_stack([x, np.ones(len(x))])
    ridge = np.sqrt(1e-3 * len(x) * x[:, :-1].var(0).mean()) * np.eye(64, 65)
    wanted = np.linalg.lstsq(np.concatenate([x, ridge]), np.concatenate([y, np.zeros((64, 2))]), rcond=None)[0]
    gate = np.column_stack([whole.layers[1].gate_weight, whole.layers[1].gate_bias])
    np.testing.assert_allclose(x @ gate.T, x @ wanted, rtol=0, atol=2e-2)


@pytest.mark.parametrize("at", [1, 4, 7, 8, 10])
def test_an_interrupted_run_goes_on(at: int, whole: Statistics, llama: Path, text: Path, tmp_path: Path, monkeypatch):
    passes, run = 0, module.run_graph

    def interrupted(*arguments):
        nonlocal passes
        passes += 1
        if passes == at + 5:  # behind the five chunks of the queries
            raise KeyboardInterrupt
        run(*arguments)

    monkeypatch.setattr(module, "run_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learned(llama, tmp_path / "stats", text)
    saved = statistics_file.load(tmp_path / "stats")
    assert saved.learned.done == at - 1 and not saved.learned.finished
    assert (saved.layers[0].gate_weight is None) == (at <= 6)
    same(learned(llama, tmp_path / "stats", text), whole)
    assert passes == 5 + 10 + 1  # nothing is run twice but what was interrupted


def test_gates_can_be_added_later_and_left_out(llama: Path, text: Path, tmp_path: Path, whole: Statistics) -> None:
    path = tmp_path / "stats"
    assert learned(llama, path, text, gates=False).learned is None
    assert statistics_file.load(path).layers[0].share is None
    same(learned(llama, path, text), whole)
    before = path.read_bytes()
    for gates in (True, False):
        same(learned(llama, path, text, gates=gates), whole)
    assert path.read_bytes() == before
    with pytest.raises(StatisticsError, match="shares of texts of 600 tokens, not 700"):
        calibrate(llama, path, [text], 1200, 256, QUIET, gates=True, context=700)


def test_layer_by_layer_is_the_same(llama: Path, text: Path, tmp_path: Path, whole: Statistics) -> None:
    same(learned(llama, tmp_path / "stats", text, layer_by_layer=True), whole, 1e-4)


def test_two_workers_do_the_work_of_one(
    llama: Path, text: Path, tmp_path: Path, whole: Statistics, monkeypatch
) -> None:
    threads = Threads(2)
    loaded, tokenizer = module.load_model(llama), module.load_tokenizer(llama)  # loading is not made for threads
    monkeypatch.setattr(module, "load_model", lambda _: loaded)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(module, "Workers", threads)
    monkeypatch.setattr(learn, "SAVE_EVERY", 1)
    for found in threads.run(2, lambda: learned(llama, tmp_path / "two", text)):
        same(found, whole)
    same(statistics_file.load(tmp_path / "two"), whole)


def test_latent_attention_gets_no_gate(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_model(family_model("deepseek_v2"), tmp_path / "model")
    found = calibrate(model, tmp_path / "stats", [text], 512, 256, Progress(), gates=True)
    assert found.learned is None and found.layers[0].gate_weight is None
    assert "gates" in (said := capsys.readouterr().err) and "none: layer 0, node" in said


def test_a_text_too_short_for_shares_is_said(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning_texts, "BUDGETS", (100_000,))
    model = tiny_folder("llama", tmp_path)
    found = calibrate(model, tmp_path / "stats", [text], 512, 256, Progress(), gates=True)
    assert found.learned is not None and not found.learned.budgets
    assert "; no shares, for which" in capsys.readouterr().err
    calibrate(model, tmp_path / "stats", [text], 768, 256, Progress(), gates=True)
    assert "kept as learned before" in capsys.readouterr().err


def test_a_context_beyond_the_model_is_refused_before_anything_is_measured(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match=r"context is 1,000,000 tokens, but the model takes"):
        calibrate(tiny_folder("llama", tmp_path), tmp_path / "stats", [text], 512, 256, QUIET, context=1_000_000)
    assert not (tmp_path / "stats").exists()
