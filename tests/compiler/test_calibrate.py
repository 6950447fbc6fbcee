"""Calibration: the means are those of hooks on the model, and an interrupted run loses and repeats nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from keysieve.compiler import calibrate as module
from keysieve.compiler import statistics as statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.model import identity
from keysieve.compiler.pipeline import Matched, find, tap_graph
from keysieve.compiler.progress import Progress
from keysieve.compiler.text import iter_texts, text_sha256, token_chunks
from keysieve.errors import ConfigError, StatisticsError
from keysieve.passes.graph import Graph
from support.bundles import CALIBRATION_TOKENS, tiny_folder, tiny_statistics
from support.masked_reference import calibrate_by_hooks
from support.tiny_models import DECODERS, TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Progress(quiet=True)
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
    assert calibrate(mha, path, [text], 2500, 256, QUIET).tokens == 2500
    return path


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copy(whole, tmp_path / "stats"))


def same(found: statistics_file.Statistics, wanted: statistics_file.Statistics, tolerance: float) -> None:
    assert (found.tokens, found.text_sha256, found.model) == (wanted.tokens, wanted.text_sha256, wanted.model)
    for a, b in zip(found.layers, wanted.layers, strict=True):
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
            calibrate(mha, path, [text], 2500, 256, QUIET)
        if done:
            saved = statistics_file.load(path)
            assert (saved.tokens, saved.tokens_planned) == (done, 2500)
        else:
            assert not path.exists()
    rest = Interrupts(at=-1)
    monkeypatch.setattr(module, "run_graph", rest)
    calibrate(mha, path, [text], 2500, 256, QUIET)
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
        calibrate(mha, tmp_path / "stats", [text], 2500, 256, QUIET)
    assert statistics_file.load(tmp_path / "stats").tokens == 4 * 256


def test_a_finished_file_returns_at_once(
    mha: Path, text: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished.read_bytes(), finished.stat().st_mtime_ns)
    monkeypatch.setattr(module, "run_graph", Interrupts(at=1))
    for max_tokens in (2500, 1000):
        found = calibrate(mha, finished, [text], max_tokens, 256, QUIET)
        same(found, statistics_file.load(finished), 0)
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before


def test_a_text_that_ended_early_counts_as_finished(
    mha: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats"
    first = calibrate(mha, path, [text], 65536, 256, QUIET)
    assert 2500 < first.tokens < 65536 and first.tokens % 256
    monkeypatch.setattr(module, "run_graph", Interrupts(at=1))
    same(calibrate(mha, path, [text], 65536, 256, QUIET), first, 0)


def test_a_longer_run_goes_on_from_a_shorter_one(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    calibrate(mha, path, [text], 1024, 256, QUIET)
    same(calibrate(mha, path, [text], 2500, 256, QUIET), statistics_file.load(whole), 1e-12)


def test_a_partial_chunk_cannot_be_continued(mha: Path, text: Path, finished: Path) -> None:
    before = finished.read_bytes()
    with pytest.raises(StatisticsError, match=r"stats was finished with 2,500 tokens.*remove it"):
        calibrate(mha, finished, [text], 3000, 256, QUIET)
    assert finished.read_bytes() == before


def test_several_texts_are_read_on_end(mha: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(TEXT * 5, encoding="utf-8")
    found = calibrate(mha, tmp_path / "stats", files, 1500, 256, QUIET)
    assert found.text_sha256 == text_sha256([TEXT * 10])
    assert found.tokens == 1500


def test_what_belongs_to_another_text_or_model_is_kept(
    mha: Path, text: Path, finished: Path, tmp_path: Path, root: Path
) -> None:
    path, before = finished, finished.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(TEXT * 10, encoding="utf-8")
    with pytest.raises(StatisticsError, match=r"stats holds statistics of another text; remove it, or choose another"):
        calibrate(mha, path, [other], 1100, 256, QUIET)
    with pytest.raises(StatisticsError, match=r"do not belong to this model: config_sha256"):
        calibrate(tiny_folder("llama_linear", root), path, [text], 1100, 256, QUIET)
    assert path.read_bytes() == before
    foreign = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, foreign)
    with pytest.raises(StatisticsError, match=r"model\.safetensors.*is not a keysieve statistics file"):
        calibrate(mha, foreign, [text], 1100, 256, QUIET)
    assert list(load_file(foreign)) == ["weight"]
    with pytest.raises(StatisticsError, match=r"measured in chunks of 256 tokens, which 128 cannot continue"):
        calibrate(mha, path, [text], 3000, 128, QUIET)
    assert path.read_bytes() == before


def test_the_official_format_round_trips(mha: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    ours = statistics_file.load(whole)
    path = tmp_path / "stats.pt"
    calibrate(mha, path, [text], 2500, 256, QUIET)
    ropes = [layer.rope for layer in ours.layers]
    found = statistics_file.read(path, ours.model, ropes, [4] * len(ropes))
    for layer, wanted in zip(found.layers, ours.layers, strict=True):
        np.testing.assert_allclose(layer.q_mean, wanted.q_mean, atol=1e-6)
        np.testing.assert_allclose(layer.q_abs, wanted.q_abs, atol=1e-6)
    with pytest.raises(StatisticsError, match=r"stats\.pt exists already"):
        calibrate(mha, path, [text], 2500, 256, QUIET)


def test_a_short_text_warns(mha: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(TEXT, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"the text has \d+ tokens; with fewer than 1,000 the result is mostly noise"):
        calibrate(mha, tmp_path / "stats", [file], 65536, 256, QUIET)
    assert (tmp_path / "stats").is_file()


def test_an_empty_text_is_an_error(mha: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="the text holds no tokens; give a longer one"):
        calibrate(mha, tmp_path / "stats", [tmp_path / "empty.txt"], progress=QUIET)
    assert not (tmp_path / "stats").exists()


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(
    mha: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = Interrupts(at=-1)
    monkeypatch.setattr(module, "run_graph", interrupts)
    with pytest.raises(ConfigError, match=r"the folder of output .*absent/stats does not exist"):
        calibrate(mha, tmp_path / "absent" / "stats", [text], 1100, 256, QUIET)
    assert interrupts.passes == 0
