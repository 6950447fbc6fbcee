"""The texts from which gates and shares are learned: chunks of the calibration text, and synthetic facts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from keysieve.compiler.facts import fact_prose
from keysieve.compiler.head_shares import FLOOR, SINKS, usable_budgets
from keysieve.compiler.statistics import Learned
from keysieve.compiler.text import token_chunks
from keysieve.errors import ConfigError

FACTS_EVERY = 3  # each third context or text is synthetic
CONTEXTS, HELD_OUT, CONTEXT_TOKENS = 24, 4, 640  # at most
LEAST, TEXT_A_CONTEXT = 12, 1024  # contexts; tokens of the calibration text for which there is one more
TEXTS, CONTEXT, APART = 2, 4096, 2  # at most; tokens of one; for how many times its length of the text there is one
BUDGETS = (256, 512, 1024, 2048)
LEAST_CONTEXT = 2 * BUDGETS[0]  # tokens of a text from which shares can be learned (see usable_budgets)
SEED = 1
REPEAT = "\n\nRepeat the previous text exactly:\n\n"


@dataclass
class LearningTexts:
    """Token lists, all of one length each: contexts [S] = context + REPEAT + context, and texts [share_context].

    repeats: the first token of the repetition; contexts that are held out come last.
    """

    contexts: list[list[int]]
    texts: list[list[int]]
    repeats: int


def plan_learning(tokenizer: Any, total: int, limit: int, context: int | None = None) -> Learned:
    """What to learn from a text of `total` tokens with a model of `limit` positions.

    context: tokens of the texts for shares, CONTEXT unless given; fewer where text or model are shorter. Raises
    ConfigError as check_learning does.
    """
    twice = check_learning(tokenizer, limit, context)
    length = context or min(CONTEXT, limit, max(total, FLOOR))
    budgets = usable_budgets(BUDGETS, length)
    contexts = min(CONTEXTS, max(LEAST, total // TEXT_A_CONTEXT))
    held_out = HELD_OUT if contexts == CONTEXTS else HELD_OUT // 2
    texts = min(TEXTS, max(1, total // length // APART)) if budgets else 0
    return Learned(SEED, contexts, held_out, texts, min(CONTEXT_TOKENS, twice), length if budgets else 0, budgets)


def check_learning(tokenizer: Any, limit: int, context: int | None = None) -> int:
    """How many tokens a model of `limit` positions can read twice.

    Raises ConfigError for a context that the model cannot take, or for a model without room for a context read twice.
    """
    if context is not None and context > limit:
        raise ConfigError(f"context is {context:,} tokens, but the model takes {limit:,}; choose fewer")
    twice = (limit - len(_instruction(tokenizer))) // 2
    if twice <= 2 * SINKS:
        raise ConfigError(f"the model takes {limit} tokens, too few to learn gates; leave them out (--no-gates)")
    return twice


def learning_texts(
    start_texts: Callable[[], Iterator[str]], tokenizer: Any, total: int, plan: Learned
) -> LearningTexts:
    """Gather the token lists of a plan.

    The chunks are spread evenly over the `total` tokens of the calibration text; where it is too short for as many,
    synthetic ones take their places. The same arguments give the same texts.
    """
    instruction, count = _instruction(tokenizer), plan.contexts + plan.held_out
    plain = _spread(start_texts, tokenizer, total, plan.context_tokens, count)
    made = _with_facts(plain, tokenizer, count, plan.context_tokens, plan.seed)
    # Every so many are held out, so that both cover the whole text and have synthetic ones.
    held_out = {index * count // plan.held_out for index in range(plan.held_out)}
    order = sorted(range(count), key=lambda index: index in held_out)
    contexts = [made[index] + instruction + made[index] for index in order]
    texts = []
    if plan.texts:
        plain = _spread(start_texts, tokenizer, total, plan.share_context, plan.texts)
        texts = _with_facts(plain, tokenizer, plan.texts, plan.share_context, plan.seed + count)
    return LearningTexts(contexts, texts, plan.context_tokens + len(instruction))


def _instruction(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(REPEAT, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _spread(
    start_texts: Callable[[], Iterator[str]], tokenizer: Any, total: int, tokens: int, count: int
) -> dict[int, list[int]]:
    """Chunks of the text by the places 0 .. count-1 that are not synthetic, as far as there are enough."""
    places = [index for index in range(count) if index % FACTS_EVERY != FACTS_EVERY - 1]
    whole = total // tokens
    if not whole:
        return {}
    places = places[:whole]
    wanted = {index * whole // len(places): place for index, place in enumerate(places)}
    found = {}
    for number, ids in enumerate(token_chunks(start_texts(), tokenizer, tokens, total)):
        if number in wanted:
            found[wanted[number]] = ids
        if len(found) == len(wanted):
            break
    return found


def _with_facts(plain: dict[int, list[int]], tokenizer: Any, count: int, tokens: int, seed: int) -> list[list[int]]:
    """The chunks, and synthetic texts in all other places."""
    return [plain.get(index) or _facts(tokenizer, tokens, seed + index) for index in range(count)]


def _facts(tokenizer: Any, tokens: int, seed: int) -> list[int]:
    text, ids = "", []
    for paragraph in fact_prose(seed):
        text += paragraph
        if len(text) >= 3 * tokens:  # hardly any tokenizer makes fewer tokens of it
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return ids[:tokens]
