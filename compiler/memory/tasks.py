"""The tasks by name, and their trials."""

from collections.abc import Callable, Sequence
from typing import Any

from keysieve.compiler.memory.chat import chat
from keysieve.compiler.memory.facts import facts
from keysieve.compiler.memory.few_shot import few_shot
from keysieve.compiler.memory.instructions import instructions
from keysieve.compiler.memory.lists import lists
from keysieve.compiler.memory.needles import niah_needle, niah_noise
from keysieve.compiler.memory.trial import Draft, Trial, make_trial
from keysieve.compiler.memory.two_orders import two_orders
from keysieve.compiler.memory.variables import variables
from keysieve.compiler.memory.word_row import word_row
from keysieve.compiler.memory.words import Draw
from keysieve.errors import ConfigError

TASKS: dict[str, Callable[[Draw, int], Draft]] = {
    "facts": facts,
    "lists": lists,
    "instructions": instructions,
    "few-shot": few_shot,
    "chat": chat,
    "niah-noise": niah_noise,
    "niah-needle": niah_needle,
    "variables": variables,
    "words": word_row,
    "both": two_orders,
}


def check_tasks(names: Sequence[str]) -> None:
    """Raise ConfigError unless there are names, all of tasks."""
    if not names:
        raise ConfigError(f"there is no task to measure; choose some of {', '.join(TASKS)}")
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ConfigError(f"unknown task {unknown[0]!r}; choose some of {', '.join(TASKS)}")


def make_trials(name: str, tokenizer: Any, tokens: int, trials: int, seed: int) -> list[Trial]:
    """`trials` trials of a task, of `tokens` tokens each; the same arguments give the same trials.

    Raises ConfigError where the task does not fit into so few tokens.
    """
    result = []
    for number in range(trials):
        draw = Draw(f"{name} {seed} {number}")
        try:
            result.append(make_trial(TASKS[name](draw, number), draw, tokenizer, tokens))
        except ConfigError as error:
            raise ConfigError(f"task {name}: {error}") from error
    return result
