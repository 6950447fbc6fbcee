"""remember: what is counted, one dense run a trial, and no perfect score for nothing."""

from pathlib import Path
from typing import Any

import pytest

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.engine import Engine, Generation, load
from keysieve.compiler.memory import remember
from keysieve.compiler.memory.tasks import TASKS, make_trials
from keysieve.compiler.progress import Progress
from keysieve.errors import ConfigError, EngineError
from support.bundles import tiny_bundle
from support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = EvictionConfig(PolicyConfig("streaming"), budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def bundle(root: Path) -> Path:
    return tiny_bundle("llama", SMALL, root)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, threads=1)


class Replies:
    """In place of Engine.generate: right answers where `right` says so, and the record of all requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, right: Any) -> None:
        self.requests: list[tuple[int, int | None]] = []
        self.answers: dict[tuple[int, ...], tuple[int, str]] = {}
        self.right = right
        monkeypatch.setattr(Engine, "generate", lambda _, prompts, **options: self.generate(prompts, **options))

    def expect(self, tasks: list[str], tokens: int, trials: int, seed: int) -> None:
        for task in tasks:
            for number, trial in enumerate(make_trials(task, tiny_tokenizer(), tokens, trials, seed)):
                self.answers[tuple(trial.prompt)] = (number, trial.answer)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, prompt: str, budget: int | None = None, dense: bool = False
    ) -> list[Generation]:
        assert dense == (budget is None) and prompt == "evictable"
        number, answer = self.answers[tuple(prompts[0])]
        self.requests.append((number, budget))
        text = f" {answer}." if self.right(number, budget) else " nothing"
        assert len(tiny_tokenizer()(f" {answer}")["input_ids"]) <= max_new_tokens
        return [Generation(text, [], "length")]


def test_what_is_kept_is_counted_among_what_dense_knows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(number: int, budget: int | None) -> bool:
        return number != 1 if budget is None else number >= (4 if budget == 48 else 1)

    replies = Replies(monkeypatch, right)
    replies.expect(["facts", "chat"], 1600, 6, 7)
    rows = remember(engine, ["facts", "chat"], (48, 160), 1600, 6, 7, QUIET)["rows"]
    counts = [("facts", 48, 2), ("facts", 160, 4), ("chat", 48, 2), ("chat", 160, 4)]
    assert rows == [
        {
            "task": task,
            "tokens": 1600,
            "budget": budget,
            "policy": "streaming",
            "trials": 6,
            "dense": 5,
            "kept": kept,
        }
        for task, budget, kept in counts
    ]
    # dense once a trial, and no budget where dense is wrong
    facts = replies.requests[: len(replies.requests) // 2]
    assert facts == [(n, budget) for n in range(6) for budget in ((None,) if n == 1 else (None, 48, 160))]


def test_a_dense_run_that_is_known_is_not_repeated(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = Replies(monkeypatch, lambda *_: True)
    replies.expect(["facts"], 1600, 3, 0)
    dense: dict[str, list[bool]] = {}
    remember(engine, ["facts"], (48,), 1600, 2, 0, QUIET, dense=dense)
    assert dense == {"facts": [True, True]}
    replies.requests.clear()
    row = remember(engine, ["facts"], (48,), 1600, 3, 0, QUIET, dense=dense)["rows"][0]
    assert replies.requests == [(0, 48), (1, 48), (2, None), (2, 48)]
    assert (row["dense"], row["kept"]) == (3, 3)


def test_a_real_engine_answers_all_tasks(bundle: Path) -> None:
    rows = remember(bundle, budgets=(48,), tokens=1600, trials=1, progress=QUIET, threads=1)["rows"]
    assert [row["task"] for row in rows] == list(TASKS)
    assert all(0 <= row["kept"] <= row["dense"] <= 1 for row in rows)


def test_heads_with_budgets_of_their_own_are_in_the_name(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = Replies(monkeypatch, lambda *_: True)
    replies.expect(["facts"], 1600, 1, 0)
    manifest = engine.manifest | {"eviction": engine.manifest["eviction"] | {"heads": "classes"}}
    monkeypatch.setattr(engine, "manifest", manifest)
    assert remember(engine, ["facts"], (48,), 1600, 1, 0, QUIET)["rows"][0]["policy"] == "streaming heads classes"


@pytest.mark.parametrize(
    ("options", "error", "wanted"),
    [
        ({"tasks": ["facts", "sums"]}, ConfigError, "unknown task 'sums'; choose some of facts, lists"),
        ({"tasks": []}, ConfigError, "there is no task to measure"),
        ({"trials": 0}, ConfigError, "trials is 0; ask for at least one"),
        ({"seed": -1}, ConfigError, "seed is -1; it must be at least 0"),
        ({"budgets": ()}, ConfigError, "remember needs at least one budget"),
        ({"budgets": (48, 10)}, ConfigError, "budget 10 leaves no row to choose"),
        ({"budgets": (1600,)}, EngineError, "budget 1600 evicts nothing: prompts have 1,600 tokens.*at 1,616 rows"),
        ({"budgets": (1585,)}, EngineError, "budget 1585 evicts nothing"),
        ({"tokens": 4097}, EngineError, "make 4,097 tokens, but the model of .* was made for 4,096.*ask for fewer"),
        ({"tokens": 4096}, EngineError, r"make 4,1\d\d tokens, but the model of .* was made for 4,096"),
        ({"tokens": 100}, ConfigError, "task facts: 100 tokens are too few: without filler it takes"),
    ],
)
def test_what_cannot_work_is_an_error_before_any_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], wanted: str
) -> None:
    replies = Replies(monkeypatch, lambda *_: True)
    with pytest.raises(error, match=wanted):
        remember(engine, **{"budgets": (48,), "tokens": 1600, "trials": 2, "progress": QUIET, **options})
    assert not replies.requests


def test_a_bundle_without_tokenizer_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.__dict__, "tokenizer", None)
    with pytest.raises(EngineError, match="has no tokenizer, so it cannot read the tasks' texts; compile a model"):
        remember(engine, budgets=(48,), tokens=1600, trials=1, progress=QUIET)
