"""remember: what an engine still knows after eviction, beside its own run without eviction.

Both runs read the same prompt, which ends where the answer begins, and answer greedily.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keysieve.compiler.compare import policy_name
from keysieve.compiler.config import check_budget
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.memory.tasks import TASKS, check_tasks, make_trials
from keysieve.compiler.memory.trial import Trial
from keysieve.compiler.progress import Progress
from keysieve.errors import ConfigError, EngineError

BUDGETS = (256, 512)
TOKENS = 1024
TRIALS = 20
SPARE = 4  # tokens of a reply besides those of the answer

Right = dict[str, list[bool]]


def remember(
    bundle: Path | str | Engine,
    tasks: Sequence[str] = tuple(TASKS),
    budgets: Sequence[int] = BUDGETS,
    tokens: int = TOKENS,
    trials: int = TRIALS,
    seed: int = 0,
    progress: Progress | None = None,
    threads: int | None = None,
    device: str = "cpu",
    compiled: bool = False,
    dense: Right | None = None,
) -> dict[str, Any]:
    """Ask a bundle `trials` questions a task, about prompts of `tokens` tokens, at every budget.

    threads, device, compiled: of keysieve.load, where bundle is a path. dense: by task, whether the dense run answered
    each trial right, as known from another bundle of the same model with the same tokens, trials and seed; what is
    missing is measured and added.
    Returns {"rows": [{"task", "tokens", "budget", "policy", "trials", "dense", "kept"}, ...]}: dense counts the right
    answers without eviction, kept those of them that eviction left right. A budget that evicts nothing is an error.
    """
    check_tasks(tasks)
    if trials < 1:
        raise ConfigError(f"trials is {trials}; ask for at least one a task")
    if not budgets:
        raise ConfigError("remember needs at least one budget")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    engine = bundle if isinstance(bundle, Engine) else load(bundle, threads, device, compiled=compiled)
    progress = progress or Progress()
    dense = {} if dense is None else dense
    if engine.tokenizer is None:
        raise EngineError(
            f"{engine.bundle.path} has no tokenizer, so it cannot read the tasks' texts; compile a model folder that "
            "has one"
        )
    _check_tokens(engine, tokens, budgets)
    rows = []
    for task in dict.fromkeys(tasks):
        with progress.stage(task) as stage:
            made = make_trials(task, engine.tokenizer, tokens, trials, seed)
            _check_positions(engine, made)
            known = dense.setdefault(task, [])
            kept = dict.fromkeys(budgets, 0)
            for number, trial in enumerate(progress.track(made, len(made), task)):
                if number == len(known):
                    known.append(_answers(engine, trial, dense=True))
                for budget in budgets if known[number] else ():
                    kept[budget] += _answers(engine, trial, budget=budget)
            right = sum(known[:trials])
            counts = ", ".join(f"{count} of {right} with {budget}" for budget, count in kept.items())
            stage.note(f"{right} of {trials} dense; {counts}")
        names = {"task": task, "tokens": tokens}
        counted = {"policy": _policy(engine), "trials": trials, "dense": right}
        rows += [{**names, "budget": budget, **counted, "kept": count} for budget, count in kept.items()]
    return {"rows": rows}


def _policy(engine: Engine) -> str:
    """The policy as reports name it, with its heads where they have budgets of their own."""
    eviction = engine.manifest["eviction"]
    return policy_name(eviction["policy"]) + (" heads classes" if eviction["heads"] == "classes" else "")


def _answers(engine: Engine, trial: Trial, **how: Any) -> bool:
    """Whether a reply is right; how: dense=True or budget=N."""
    return trial.accepts(engine.generate([trial.prompt], **_request(engine, trial), **how)[0].text)


def _request(engine: Engine, trial: Trial) -> dict[str, Any]:
    answer = engine.tokenizer(f" {trial.answer}", add_special_tokens=False)["input_ids"]
    return {"max_new_tokens": len(answer) + SPARE, "prompt": "evictable"}


def _check_tokens(engine: Engine, tokens: int, budgets: Sequence[int]) -> None:
    """Raise a KeySieveError where a budget cannot work, or evicts nothing from a prompt of so many tokens."""
    eviction = engine.manifest["eviction"]
    for budget in budgets:
        check_budget(budget, int(eviction["sinks"]), int(eviction["recent"]))
        first = budget + int(eviction["interval"])
        if tokens < first:
            raise EngineError(
                f"budget {budget} evicts nothing: prompts have {tokens:,} tokens, and the first eviction comes at "
                f"{first:,} rows; ask for more tokens or smaller budgets"
            )
    limit = engine.manifest.get("position_limit")
    if limit and tokens > limit:
        raise _too_long(engine, tokens)


def _check_positions(engine: Engine, trials: Sequence[Trial]) -> None:
    """Raise EngineError before any work where a prompt and its reply go beyond the model's positions."""
    longest = max(len(trial.prompt) + _request(engine, trial)["max_new_tokens"] for trial in trials)
    limit = engine.manifest.get("position_limit")
    if limit and longest > limit:
        raise _too_long(engine, longest)


def _too_long(engine: Engine, tokens: int) -> EngineError:
    return EngineError(
        f"prompt and answer make {tokens:,} tokens, but the model of {engine.bundle.path} was made for "
        f"{engine.manifest['position_limit']:,} positions; ask for fewer tokens"
    )
