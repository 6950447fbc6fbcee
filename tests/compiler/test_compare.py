"""compare: the numbers of a report against a naive computation, and no perfect score for nothing."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from keysieve.compiler import compare as module
from keysieve.compiler.compare import Fidelity, compare, copy_split, log_sum, measure, policy_name, read
from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.progress import Progress
from keysieve.errors import ConfigError, EngineError
from support.bundles import tiny_bundle
from support.tiny_models import TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = EvictionConfig(PolicyConfig("triattention"), budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def engine(root: Path) -> Engine:
    return load(tiny_bundle("llama", SMALL, root), threads=1)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    files = []
    for n, part in enumerate((TEXT, TEXT[::-1], TEXT[100:] + TEXT)):
        files.append(tmp_path / f"text{n}.txt")
        files[-1].write_text(part * 3, encoding="utf-8")
    return files


def test_the_rows_are_the_naive_numbers(engine: Engine, texts: list[Path]) -> None:
    with pytest.warns(UserWarning, match="with fewer than 1,000"):
        rows = compare(engine, texts, budgets=(48, 160), max_tokens=400, progress=QUIET)["rows"]
    assert [(row["policy"], row["heads"], row["budget"], row["scope"]) for row in rows] == [
        ("triattention", "uniform", 48, "per_layer_per_head"),
        ("triattention", "uniform", 160, "per_layer_per_head"),
    ]
    model = tiny_model("llama")
    for row in rows:
        kl, agree, loss, dense_loss, split = [], [], [], [], []
        for text in texts:
            ids = tiny_tokenizer()(text.read_text())["input_ids"][:400]
            session = engine.session(budget=row["budget"], capacity=row["budget"] + 128)
            found = []
            for start in range(0, 400, 128):
                part = ids[start : start + 128]
                following = min(128, max(1, 400 - start - len(part)))
                logits = session.step(np.array([part]), np.array([len(part)]), np.arange(len(part))[None], following)
                found.append(torch.from_numpy(logits[0].copy()))
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            q = torch.cat(found)[:-1].double().log_softmax(-1)
            targets = torch.tensor(ids[1:])
            kl.append((p.exp() * (p - q)).sum(-1).numpy())
            agree.append((p.argmax(-1) == q.argmax(-1)).numpy())
            loss.append(-q[torch.arange(399), targets].numpy())
            dense_loss.append(-p[torch.arange(399), targets].numpy())
            split.append(copy_split(ids))
        every = np.concatenate(kl)
        assert (row["texts"], row["tokens"]) == (3, 3 * 399)
        assert row["kl"] == pytest.approx(every.mean(), abs=1e-5) and row["kl"] > 0.01
        assert row["kl_p95"] == pytest.approx(np.percentile(every, 95), abs=1e-5)
        means = [part.mean() for part in kl]
        assert row["kl_se"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), abs=1e-6)
        assert row["top1"] == np.concatenate(agree).mean()
        assert row["ppl"] == pytest.approx(np.exp(np.concatenate(loss).mean()), rel=1e-5)
        assert row["ppl_dense"] == pytest.approx(np.exp(np.concatenate(dense_loss).mean()), rel=1e-5)
        kinds = np.concatenate(split)
        for n, name in enumerate(("far", "recent", "new")):
            if (kinds == n).any():
                part = row["kl_split"][name]
                assert part["tokens"] == (kinds == n).sum()
                assert part["kl"] == pytest.approx(every[kinds == n].mean(), abs=1e-5)
        assert sum(part["tokens"] for part in row["kl_split"].values()) == row["tokens"]
        assert row["rows_evicted"] > 0
    assert rows[0]["kl"] > rows[1]["kl"] and rows[0]["top1"] < rows[1]["top1"]
    assert rows[0]["rows_evicted"] > rows[1]["rows_evicted"]


def test_a_dense_engine_equals_itself(engine: Engine) -> None:
    ids = tiny_tokenizer()(TEXT * 2)["input_ids"][:300]
    result = {"itself": Fidelity()}
    dense = [engine.session(dense=True, capacity=300) for _ in range(2)]
    measure(read(dense[0], ids), {"itself": dense[1]}, ids, result)
    summary = result["itself"].summary()
    assert abs(summary["kl"]) < 1e-7 and summary["top1"] == 1.0
    assert summary["ppl"] == summary["ppl_dense"]
    assert (summary["tokens"], summary["rows_evicted"], summary["kl_se"]) == (299, 0, None)


def test_a_text_may_end_at_a_chunk_or_one_token_later(engine: Engine, texts: list[Path]) -> None:
    for count in (256, 257):
        with pytest.warns(UserWarning):
            row = compare(engine, texts[:1], budgets=(48,), max_tokens=count, progress=QUIET)["rows"][0]
        assert row["tokens"] == count - 1


def test_where_a_bigram_was_seen_before() -> None:
    assert copy_split([1, 2, 3]).tolist() == [2, 2]
    assert copy_split([1, 2, 3, 1, 2, 4, 1, 2]).tolist() == [2, 2, 2, 1, 2, 2, 1]
    filler = list(range(100, 100 + module.FAR))
    assert copy_split([1, 2, *filler[:-2], 1, 2])[-1] == 1  # seen FAR tokens ago: still recent
    assert copy_split([1, 2, *filler[:-1], 1, 2])[-1] == 0  # one more: far
    assert copy_split([5]).tolist() == []


def test_log_sum_is_stable() -> None:
    logits = np.array([[1e4, 1e4, -1e4], [0.0, math.log(2), math.log(5)]], np.float32)
    np.testing.assert_allclose(log_sum(logits)[:, 0], [1e4 + math.log(2), math.log(8)], rtol=1e-6)


def test_the_policys_name_says_what_was_changed() -> None:
    policy = {"name": "triattention", "centres": "calibrated", "norm": True, "trig": True, "aggregation": "mean"}
    assert policy_name(policy) == "triattention"
    assert policy_name({**policy, "centres": "online", "norm": False}) == "triattention-online-trig-only"
    assert policy_name({**policy, "trig": False, "aggregation": "max"}) == "triattention-norm-only-max"
    assert policy_name({"name": "key-norm"}) == "key-norm"


@pytest.mark.filterwarnings("ignore:the text has")
def test_a_budget_without_effect_is_an_error(engine: Engine, texts: list[Path]) -> None:
    for budget in (285, 400):
        wanted = rf"budget {budget} evicts nothing: the longest text has 300 tokens.*at {budget + 16} rows.*smaller"
        with pytest.raises(EngineError, match=wanted):
            compare(engine, texts, budgets=(48, budget), max_tokens=300, progress=QUIET)
    row = compare(engine, texts[:1], budgets=(284,), max_tokens=300, progress=QUIET)["rows"][0]
    assert row["rows_evicted"] == 16


def test_a_budget_below_the_protected_rows_is_an_error(engine: Engine, texts: list[Path]) -> None:
    with pytest.warns(UserWarning), pytest.raises(EngineError, match="budget 10 leaves no row to choose"):
        compare(engine, texts[:1], budgets=(10,), progress=QUIET)


def test_nothing_to_compare_is_an_error(engine: Engine, texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one text and one budget"):
        compare(engine, [], progress=QUIET)
    with pytest.raises(ConfigError, match="at least one text and one budget"):
        compare(engine, texts, budgets=(), progress=QUIET)
    with pytest.raises(ConfigError, match=r"there is no text file .*none\.txt"):
        compare(engine, [tmp_path / "none.txt"], budgets=(48,), progress=QUIET)


@pytest.mark.filterwarnings("ignore:the text has")
def test_a_text_of_one_token_is_an_error(engine: Engine, texts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"one\.txt"):
        compare(engine, [*texts, tmp_path / "one.txt"], budgets=(48,), max_tokens=200, progress=QUIET)
