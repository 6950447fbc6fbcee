"""The texts of learning: their lengths, where they come from, and that the same plan gives the same ones."""

from dataclasses import replace
from itertools import islice

import pytest

from keysieve.compiler.facts import fact_prose
from keysieve.compiler.learning_texts import LearningTexts, learning_texts, plan_learning
from keysieve.compiler.statistics import Learned
from keysieve.errors import ConfigError
from support.tiny_models import tiny_tokenizer

TEXT = "".join(f"Line {n} of the text.\n" for n in range(400))
PLAN = Learned(seed=5, contexts=6, held_out=2, texts=3, context_tokens=20, share_context=60, budgets=[256])


def gathered(plan: Learned = PLAN, text: str = TEXT) -> tuple[LearningTexts, list[int]]:
    ids = tiny_tokenizer()(text)["input_ids"]
    return learning_texts(lambda: iter([text]), tiny_tokenizer(), len(ids), plan), ids


def is_part(ids: list[int], whole: list[int]) -> bool:
    return any(whole[start : start + len(ids)] == ids for start in range(len(whole)))


def test_contexts_are_read_twice_and_texts_once():
    texts, _ = gathered()
    assert len(texts.contexts) == 8 and len(texts.texts) == 3
    for ids in texts.contexts:
        assert ids[:20] == ids[texts.repeats :] and len(ids) == texts.repeats + 20
        assert tiny_tokenizer().decode(ids[20 : texts.repeats]) == "\n\nRepeat the previous text exactly:\n\n"
    assert all(len(ids) == 60 for ids in texts.texts)
    assert len({tuple(ids) for ids in texts.contexts + texts.texts}) == 11


def test_a_third_is_synthetic_and_the_same_plan_gives_the_same():
    texts, ids = gathered()
    assert sum(is_part(context[:20], ids) for context in texts.contexts) == 6
    assert sum(is_part(text, ids) for text in texts.texts) == 2
    assert gathered()[0] == texts
    assert gathered(replace(PLAN, seed=6))[0] != texts


def test_a_short_text_is_filled_up_with_facts():
    texts, ids = gathered(text=TEXT[:70])
    assert 0 < sum(is_part(context[:20], ids) for context in texts.contexts) < 6
    assert not any(is_part(text, ids) for text in texts.texts)
    assert (len(texts.contexts), len(texts.texts)) == (8, 3)


def test_a_plan_fits_the_model_and_the_text():
    instruction = len(tiny_tokenizer()("\n\nRepeat the previous text exactly:\n\n")["input_ids"])
    plan = plan_learning(tiny_tokenizer(), 100_000, 8192)
    assert (plan.context_tokens, plan.share_context, plan.budgets) == (640, 4096, [256, 512, 1024, 2048])
    plan = plan_learning(tiny_tokenizer(), 100_000, 1000)
    assert (plan.context_tokens, plan.share_context) == ((1000 - instruction) // 2, 1000)
    assert plan_learning(tiny_tokenizer(), 2500, 8192).share_context == 2500
    short = plan_learning(tiny_tokenizer(), 50, 8192)
    assert (short.texts, short.share_context, short.budgets) == (0, 0, [])
    assert plan_learning(tiny_tokenizer(), 50, 8192, context=2048).share_context == 2048


def test_a_context_that_the_model_cannot_take_is_an_error():
    with pytest.raises(ConfigError, match="context is 9,000 tokens, but the model takes 8,192"):
        plan_learning(tiny_tokenizer(), 100_000, 8192, context=9000)
    with pytest.raises(ConfigError, match=r"too few to learn gates.*--no-gates"):
        plan_learning(tiny_tokenizer(), 100_000, 20)


def test_facts_are_new_in_every_seed_and_stay():
    first, again, other = ("".join(islice(fact_prose(seed), 40)) for seed in (1, 1, 2))
    assert first == again != other
    assert "passcode" not in first
    assert len(set(first.split(". "))) > 100
