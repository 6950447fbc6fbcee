"""Calibration: the means are those of hooks on the model, and an interrupted run loses and repeats nothing."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from keysieve.compiler import calibrate as module
from keysieve.compiler import statistics_file, statistics_report, weights
from keysieve.compiler.calibrate import calibrate as calibrate_all
from keysieve.compiler.layerwise import LayerByLayer
from keysieve.compiler.model import identity
from keysieve.compiler.pipeline import Matched, find, tap_graph
from keysieve.compiler.progress import Progress
from keysieve.compiler.query_moments import QueryMoments
from keysieve.compiler.statistics import Statistics
from keysieve.compiler.text import iter_texts, text_sha256, token_chunks
from keysieve.errors import CaptureError, ConfigError, MatchError, StatisticsError
from keysieve.passes.graph import Graph
from support.bundles import CALIBRATION_TOKENS, tiny_folder, tiny_statistics
from support.masked_reference import calibrate_by_hooks
from support.threads import Threads
from support.tiny_models import DECODERS, TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Progress(quiet=True)
calibrate = partial(calibrate_all, gates=False)  # those have tests of their own
FAST = ("llama", "gpt_neox", "cohere", "smollm3")
MODELS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DECODERS]


@pytest.fixture(scope="module")
def mha(root: Path) -> Iterator[Path]:
    """A model that is captured and tapped once for all tests here, since each capture costs seconds."""
    found: dict[str, Matched] = {}
    graphs: dict[int, Graph] = {}

    def find_once(model: Any, progress: Progress) -> Matched:
        weights = str(identity(model)["weights_sha256"])
        if weights not in found:
            found[weights] = find(model, progress)
        return found[weights]

    def tap_once(matched: Matched) -> Graph:
        if id(matched) not in graphs:
            graphs[id(matched)] = tap_graph(matched)
        return graphs[id(matched)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find", find_once)
        patch.setattr(module, "tap_graph", tap_once)
        yield tiny_folder("llama_mha", root)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 3,100 tokens that do not repeat."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Row {n}: {TEXT[n % 50 : n % 50 + 60]}\n" for n in range(90)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(mha: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of one undisturbed run over 2,500 tokens."""
    path = tmp_path_factory.mktemp("whole") / "stats"
    assert calibrate(mha, path, [text], 2500, 256, QUIET, gates=False).tokens == 2500
    return path


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copy(whole, tmp_path / "stats"))


def same(found: Statistics, wanted: Statistics, tolerance: float) -> None:
    assert (found.tokens, found.text_sha256, found.model) == (wanted.tokens, wanted.text_sha256, wanted.model)
    assert found.first_tokens == wanted.first_tokens
    for a, b in zip(found.layers + found.first_half, wanted.layers + wanted.first_half, strict=True):
        np.testing.assert_allclose(a.q_mean, b.q_mean, atol=tolerance, rtol=0)
        np.testing.assert_allclose(a.q_abs, b.q_abs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_means_are_those_of_hooks(name: str, root: Path) -> None:
    found = statistics_file.load(tiny_statistics(name, root))
    chunks = list(token_chunks(iter_texts(None), tiny_tokenizer(), 512, CALIBRATION_TOKENS))
    assert found.tokens == found.tokens_planned == sum(map(len, chunks)) == CALIBRATION_TOKENS
    assert found.text_sha256 == text_sha256(iter_texts(None))
    wanted = calibrate_by_hooks(tiny_model(name), chunks)
    assert len(found.layers) == len(wanted)
    for layer, (mean, magnitude) in zip(found.layers, wanted, strict=True):
        np.testing.assert_allclose(layer.q_mean, mean, atol=1e-6, rtol=0)
        np.testing.assert_allclose(layer.q_abs, magnitude, atol=1e-6, rtol=0)
    assert np.abs(found.layers[0].q_mean).max() > 0.1


class Interrupts:
    """Stands for run_graph: raises KeyboardInterrupt in place of pass number `at` (from 1)."""

    def __init__(self, at: int):
        self.at = at
        self.passes = 0
        self.run = module.run_graph

    def __call__(self, *arguments: Any) -> Any:
        self.passes += 1
        if self.passes == self.at:
            raise KeyboardInterrupt
        return self.run(*arguments)


def test_an_interrupted_run_goes_on_where_it_stopped(
    mha: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats"
    for done in (0, 3 * 256, 5 * 256):  # in the 1st pass, after 3, and after 2 more
        interrupts = Interrupts(1 if not done else 4 if done == 3 * 256 else 3)
        monkeypatch.setattr(module, "run_graph", interrupts)
        with pytest.raises(KeyboardInterrupt):
            calibrate(mha, path, [text], 2500, 256, QUIET, gates=False)
        if done:
            saved = statistics_file.load(path)
            assert (saved.tokens, saved.tokens_planned) == (done, 2500)
        else:
            assert not path.exists()
    rest = Interrupts(at=-1)
    monkeypatch.setattr(module, "run_graph", rest)
    calibrate(mha, path, [text], 2500, 256, QUIET, gates=False)
    assert rest.passes == 10 - 5  # nothing is read twice
    same(statistics_file.load(path), statistics_file.load(whole), 1e-12)
    assert list(tmp_path.iterdir()) == [path]


def test_progress_is_saved_on_the_way(mha: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)

    run = Interrupts(at=-1)

    def crash(*arguments: Any) -> Any:
        if run.passes == 4:
            raise MemoryError
        return run(*arguments)

    monkeypatch.setattr(module, "run_graph", crash)
    with pytest.raises(MemoryError):
        calibrate(mha, tmp_path / "stats", [text], 2500, 256, QUIET, gates=False)
    assert statistics_file.load(tmp_path / "stats").tokens == 4 * 256


def test_a_finished_file_returns_at_once(
    mha: Path, text: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished.read_bytes(), finished.stat().st_mtime_ns)
    monkeypatch.setattr(module, "run_graph", Interrupts(at=1))
    for max_tokens in (2500, 1000):
        found = calibrate(mha, finished, [text], max_tokens, 256, QUIET, gates=False)
        same(found, statistics_file.load(finished), 0)
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before


def test_a_text_that_ended_early_counts_as_finished(
    mha: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats"
    first = calibrate(mha, path, [text], 65536, 256, QUIET, gates=False)
    assert 2500 < first.tokens < 65536 and first.tokens % 256
    monkeypatch.setattr(module, "run_graph", Interrupts(at=1))
    same(calibrate(mha, path, [text], 65536, 256, QUIET, gates=False), first, 0)


def test_a_longer_run_goes_on_from_a_shorter_one(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    calibrate(mha, path, [text], 1024, 256, QUIET, gates=False)
    same(calibrate(mha, path, [text], 2500, 256, QUIET, gates=False), statistics_file.load(whole), 1e-12)


def test_a_partial_chunk_cannot_be_continued(mha: Path, text: Path, finished: Path) -> None:
    before = finished.read_bytes()
    with pytest.raises(StatisticsError, match=r"stats was finished with 2,500 tokens.*remove it"):
        calibrate(mha, finished, [text], 3000, 256, QUIET, gates=False)
    assert finished.read_bytes() == before


def test_several_texts_are_read_on_end(mha: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(TEXT * 5, encoding="utf-8")
    found = calibrate(mha, tmp_path / "stats", files, 1500, 256, QUIET, gates=False)
    assert found.text_sha256 == text_sha256([TEXT * 10])
    assert found.tokens == 1500


def test_what_belongs_to_another_text_or_model_is_kept(
    mha: Path, text: Path, finished: Path, tmp_path: Path, root: Path
) -> None:
    path, before = finished, finished.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(TEXT * 10, encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"stats holds statistics of another text; remove it, or choose another"):
        calibrate(mha, path, [other], 1100, 256, QUIET, gates=False)
    with pytest.raises(StatisticsError, match=r"do not belong to this model: config_sha256"):
        calibrate(tiny_folder("llama_linear", root), path, [text], 1100, 256, QUIET, gates=False)
    assert path.read_bytes() == before
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, foreign)
    with pytest.raises(StatisticsError, match=r"model\.safetensors.*is not a keysieve statistics file"):
        calibrate(mha, foreign, [text], 1100, 256, QUIET, gates=False)
    assert list(load_file(foreign)) == ["weight"]
    with pytest.raises(StatisticsError, match=r"measured in chunks of 256 tokens, which 128 cannot continue"):
        calibrate(mha, path, [text], 3000, 128, QUIET, gates=False)
    assert path.read_bytes() == before


def test_the_official_format_round_trips(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    ours = statistics_file.load(whole)
    path = tmp_path / "stats.pt"
    calibrate(mha, path, [text], 2500, 256, QUIET, gates=False)
    ropes = [layer.rope for layer in ours.layers]
    found = statistics_file.read(path, ours.model, ropes, [4] * len(ropes))
    for layer, wanted in zip(found.layers, ours.layers, strict=True):
        np.testing.assert_allclose(layer.q_mean, wanted.q_mean, atol=1e-6)
        np.testing.assert_allclose(layer.q_abs, wanted.q_abs, atol=1e-6)
    with pytest.raises(StatisticsError, match=r"stats\.pt exists already"):
        calibrate(mha, path, [text], 2500, 256, QUIET, gates=False)


def test_a_short_text_warns(mha: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"the text has \d+ tokens; with fewer than 1,000 the result is mostly noise"):
        calibrate(mha, tmp_path / "stats", [file], 65536, 256, QUIET, gates=False)
    assert (tmp_path / "stats").is_file()


def test_an_empty_text_is_an_error(mha: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="the text holds no tokens; give a longer one"):
        calibrate(mha, tmp_path / "stats", [tmp_path / "empty.txt"], progress=QUIET, gates=False)
    assert not (tmp_path / "stats").exists()


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(
    mha: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = Interrupts(at=-1)
    monkeypatch.setattr(module, "run_graph", interrupts)
    with pytest.raises(ConfigError, match=r"the folder of output .*absent/stats does not exist"):
        calibrate(mha, tmp_path / "absent" / "stats", [text], 1100, 256, QUIET, gates=False)
    assert interrupts.passes == 0


# Halves, batches, data sets


def test_the_first_half_is_that_of_the_text(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    found = statistics_file.load(whole)
    assert found.first_tokens == 5 * 256  # of 10 chunks
    half = calibrate(mha, tmp_path / "half", [text], 5 * 256, 256, QUIET, gates=False)
    assert half.first_tokens == 2 * 256
    alone = replace(found, layers=found.first_half, tokens=5 * 256, first_half=[], first_tokens=0)
    same(alone, replace(half, first_half=[], first_tokens=0), 1e-12)
    one = calibrate(mha, tmp_path / "one", [text], 256, 256, QUIET, gates=False)
    assert (one.first_half, one.first_tokens) == ([], 0)


@pytest.mark.parametrize(("before", "kept"), [(2 * 256, 5 * 256), (8 * 256, 4 * 256), (6 * 256, 6 * 256)])
def test_a_run_that_goes_on_behind_the_middle_keeps_the_nearest_half(
    before: int, kept: int, mha: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stats"
    calibrate(mha, path, [text], before, 256, QUIET, gates=False)
    found = calibrate(mha, path, [text], 2500, 256, QUIET, gates=False)
    wanted = statistics_file.load(whole)
    same(replace(found, first_tokens=0, first_half=[]), replace(wanted, first_tokens=0, first_half=[]), 1e-12)
    assert found.first_tokens == kept
    half = calibrate(mha, tmp_path / "half", [text], kept, 256, QUIET, gates=False)
    for a, b in zip(found.first_half, half.layers, strict=True):
        np.testing.assert_allclose(a.q_mean, b.q_mean, atol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_batches_change_nothing(mha: Path, text: Path, whole: Path, tmp_path: Path, batch_size: int) -> None:
    run = Interrupts(at=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_graph", run)
        found = calibrate(mha, tmp_path / "stats", [text], 2500, 256, QUIET, batch_size=batch_size, gates=False)
    assert run.passes == {3: 2 + 3, 100: 1 + 2}[batch_size]  # 5 chunks, the middle, 4 chunks and a short one
    same(found, statistics_file.load(whole), 1e-6)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        calibrate(mha, tmp_path / "other", [text], 2500, 256, QUIET, batch_size=0, gates=False)


def test_a_data_set_is_read_like_files(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    rows = [{"body": line} for line in text.read_text(encoding="utf-8").splitlines()]
    found = calibrate(mha, tmp_path / "stats", None, 2500, 256, QUIET, dataset=rows, text_field="body", gates=False)
    same(found, statistics_file.load(whole), 0)
    with pytest.raises(ConfigError, match="a generator, but its texts are read more than once"):
        calibrate(mha, tmp_path / "other", None, 2500, 256, QUIET, dataset=(row for row in rows), gates=False)


def test_a_model_that_does_not_fit_the_method_is_a_warning(
    mha: Path, text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(mha, finished, [text], 2500, 256, QUIET, gates=False)
    monkeypatch.setattr(statistics_report, "LEAST", 1.0)
    with pytest.warns(UserWarning, match=r"amplitude-weighted R is 0\.\d\d, below 1.0: .* least in layers \d \(R"):
        calibrate(mha, finished, [text], 2500, 256, QUIET, gates=False)


# Layer by layer


class Passes(LayerByLayer):
    """Remembers the ones that were made, and interrupts the pass of that number."""

    made: ClassVar[list["Passes"]] = []
    interrupt = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes = 0
        self.made.append(self)

    def run(self, batches: list[torch.Tensor], step: Any) -> list[QueryMoments]:
        self.passes += 1

        def interrupt_in_the_middle(share: float) -> None:
            step(share)
            if self.passes == self.interrupt:
                raise KeyboardInterrupt

        return super().run(batches, interrupt_in_the_middle)


@pytest.fixture
def sharded(mha: Path, tmp_path: Path) -> Path:
    """The same model in many files."""
    folder = tmp_path / "sharded"
    tiny_model("llama_mha").save_pretrained(folder, max_shard_size="60KB")
    shutil.copytree(mha, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


def test_layer_by_layer_gives_the_same_with_few_weights_at_once(
    sharded: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LayerByLayer", Passes)
    monkeypatch.setattr(module, "PASS", 2)
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(Passes, "made", [])
    monkeypatch.setattr(Passes, "interrupt", 3)
    path = tmp_path / "stats"
    with pytest.raises(KeyboardInterrupt):
        calibrate(sharded, path, [text], 2500, 256, QUIET, layer_by_layer=True, gates=False)
    assert statistics_file.load(path).tokens == 4 * 256  # whole passes only
    monkeypatch.setattr(Passes, "interrupt", 0)
    found = calibrate(sharded, path, [text], 2500, 256, QUIET, layer_by_layer=True, gates=False)
    same(found, statistics_file.load(whole), 1e-12)
    streamed = Passes.made[-1]
    model = tiny_model("llama_mha")
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    assert 0 < streamed.peak <= max(layer, model.get_input_embeddings().weight.nbytes)
    assert streamed.alive == 0
    assert len(streamed.layers) >= 4  # embedding, attention, what follows, attention
    assert streamed.passes == 1 + 3  # the fifth chunk alone, since a half ends there


def test_layer_by_layer_is_chosen_where_the_weights_do_not_fit(
    mha: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(weights, "free_memory", lambda: 400_000)
    monkeypatch.setattr(module, "find", lambda model, progress: _refuse(type(model.lm_head.weight.data), model))
    with pytest.raises(MatchError, match="one stored element"):
        calibrate(mha, tmp_path / "stats", [text], 2500, 256, Progress(), gates=False)
    assert "layer by layer, it would take 0.0 GB of memory, and 0.0 GB are free" in capsys.readouterr().err
    with pytest.raises(MatchError, match="all elements"):
        calibrate(mha, tmp_path / "stats", [text], 2500, 256, QUIET, layer_by_layer=False, gates=False)


def _refuse(_: type, model: Any) -> Matched:
    stored = model.lm_head.weight.untyped_storage().nbytes()
    raise MatchError("one stored element" if stored == 4 else "all elements")


def test_a_gguf_file_cannot_be_read_layer_by_layer(mha: Path, text: Path, tmp_path: Path) -> None:
    (mha / "model.safetensors").rename(tmp_path / "aside")
    try:
        with pytest.raises(CaptureError, match=r"has no model\.safetensors .*--no-layer-by-layer"):
            calibrate(mha, tmp_path / "stats", [text], 2500, 256, QUIET, layer_by_layer=True, gates=False)
    finally:
        (tmp_path / "aside").rename(mha / "model.safetensors")


# Several processes


@pytest.mark.parametrize(("count", "before", "batch_size"), [(2, 0, 1), (3, 2 * 256, 2), (2, 7 * 256, 1)])
def test_workers_together_do_the_work_of_one(
    count: int,
    before: int,
    batch_size: int,
    mha: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    paths = [tmp_path / "one", tmp_path / "many"]
    for path in paths:
        if before:
            calibrate(mha, path, [text], before, 256, QUIET, gates=False)
    options: dict[str, Any] = {"batch_size": batch_size}
    wanted = calibrate(mha, paths[0], [text], 2500, 256, QUIET, **options)
    passes = Interrupts(at=-1)
    threads = Threads(count)
    loaded, tokenizer = module.load_model(mha), module.load_tokenizer(mha)  # loading is not made for threads
    monkeypatch.setattr(module, "load_model", lambda _: loaded)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(module, "Workers", threads)
    monkeypatch.setattr(module, "run_graph", passes)
    found = threads.run(count, lambda: calibrate(mha, paths[1], [text], 2500, 256, QUIET, **options))
    for one in [*found, statistics_file.load(paths[1])]:
        same(one, wanted, 1e-12)
    assert passes.passes == {1: 10 - before // 256, 2: 2 + 3}[batch_size]  # no batch twice


@pytest.mark.slow
def test_two_processes_give_the_same_file_as_one(mha: Path, text: Path, tmp_path: Path) -> None:
    """`torchrun -m keysieve.compiler.calibrate`, for real."""
    options = ["--text", str(text), "--max-tokens", "2600", "--no-gates", "--report", str(tmp_path / "r.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "keysieve.compiler.calibrate", str(mha), "-o", str(tmp_path / "two"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{tmp_path}/two: 2,600 tokens, 2 layers"
    assert len(done.stdout.splitlines()) == 2  # only one of them speaks
    assert done.stderr.count("calibrate ") == 1
    one = calibrate(mha, tmp_path / "one", [text], 2600, progress=QUIET, gates=False)
    same(statistics_file.load(tmp_path / "two"), one, 1e-12)
    assert json.loads((tmp_path / "r.json").read_text())["tokens_by_half"] == [1024, 2600 - 1024]
