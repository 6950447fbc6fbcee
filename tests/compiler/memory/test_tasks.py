"""The tasks' trials: their length, their answer, the same from the same seed, and nothing of the calibration's."""

import re
from collections.abc import Iterator
from itertools import islice

import pytest

from keysieve.compiler import facts as calibration
from keysieve.compiler.memory import words
from keysieve.compiler.memory.filler import filler
from keysieve.compiler.memory.tasks import TASKS, check_tasks, make_trials
from keysieve.compiler.memory.trial import GAP, Draft, Trial, make_trial
from keysieve.compiler.memory.words import Draw
from keysieve.errors import ConfigError
from support.tiny_models import tiny_tokenizer

TOKENS = 2000  # of the tiny tokenizer, which makes many of a text
FORMS = 8  # at least as many trials as any task has forms


@pytest.fixture(scope="module")
def texts() -> dict[str, list[tuple[str, str]]]:
    """Prompt and answer of some trials of every task."""
    tokenizer = tiny_tokenizer()
    return {
        name: [
            (tokenizer.decode(trial.prompt), trial.answer) for trial in make_trials(name, tokenizer, TOKENS, FORMS, 3)
        ]
        for name in TASKS
    }


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokens", [1600, 3001])
def test_a_prompt_has_the_tokens_asked_for(name: str, tokens: int) -> None:
    for trial in make_trials(name, tiny_tokenizer(), tokens, FORMS, 0):
        assert abs(len(trial.prompt) - tokens) <= 0.02 * tokens


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_makes_the_same_trials(name: str) -> None:
    tokenizer = tiny_tokenizer()
    first, again, more = (make_trials(name, tokenizer, TOKENS, trials, 5) for trials in (3, 3, 4))
    assert first == again == more[:3]
    other = make_trials(name, tokenizer, TOKENS, 3, 6)
    assert all(one.prompt != two.prompt for one, two in zip(first, other, strict=True))
    assert len({tuple(trial.prompt) for trial in first}) == 3


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_ends_where_its_answer_begins(name: str, texts: dict[str, list[tuple[str, str]]]) -> None:
    for text, answer in texts[name]:
        assert GAP not in text and text == text.rstrip()
        tail = text[-80:]
        assert not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", tail)
        assert len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text)) == (0 if name == "few-shot" else 1)


def test_few_shot_asks_for_what_the_examples_show(texts: dict[str, list[tuple[str, str]]]) -> None:
    for text, answer in texts["few-shot"]:
        *examples, (word, rest) = re.findall(r"^(\w+) =>(.*)$", text, re.MULTILINE)
        assert len(examples) == 10 and rest == "" and word in answer and word not in dict(examples)
        assert all(shown.strip() == answer.replace(word, example) for example, shown in examples)


def test_a_list_has_its_key_once_and_is_asked_for_it(texts: dict[str, list[tuple[str, str]]]) -> None:
    for text, answer in texts["lists"]:
        beginning = text.splitlines()[-1]
        assert f"\n{beginning} {answer}" in text


def test_what_is_asked_for_lies_before_the_end(texts: dict[str, list[tuple[str, str]]]) -> None:
    for name in set(TASKS) - {"few-shot"}:
        for text, answer in texts[name]:
            assert text.index(answer) < 0.9 * len(text)
    for name in ("instructions", "chat", "words"):
        early = [text.index(answer) / len(text) for text, answer in texts[name]]
        assert max(early) < 0.5


def test_chat_follows_the_models_template_or_is_a_plain_dialogue() -> None:
    tokenizer = tiny_tokenizer()
    with_template = tokenizer.decode(make_trials("chat", tokenizer, TOKENS, 1, 0)[0].prompt)
    assert with_template.count("<user>") == 5
    tokenizer.chat_template = None
    plain = tokenizer.decode(make_trials("chat", tokenizer, TOKENS, 1, 0)[0].prompt)
    assert plain.count("User: ") == plain.count("Assistant: ") == 5
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert tokenizer.decode(make_trials("chat", tokenizer, TOKENS, 1, 0)[0].prompt) == plain


def test_noise_repeats_a_few_sentences_and_needles_are_many(texts: dict[str, list[tuple[str, str]]]) -> None:
    for text, answer in texts["niah-noise"]:
        assert text.count("The moon is bright.") > 10 and re.findall(r"\d+", text) == [answer]
    for text, answer in texts["niah-needle"]:
        question = text.splitlines()[-1].removeprefix("Answer: ")
        assert text.count(f"{question} {answer}.") == 1 and len(re.findall(r"is \d{6}\.", text)) > 10


def test_a_value_is_handed_on_to_what_is_asked_for(texts: dict[str, list[tuple[str, str]]]) -> None:
    for text, answer in texts["variables"]:
        origins = dict(re.findall(r"^(\w+) = (\w+)$", text, re.MULTILINE))
        asked = text.split()[-2]
        assert len(origins) == 4 and origins[origins[asked]] == answer


def test_filler_varies_and_states_no_number() -> None:
    sentences = list(islice(filler(Draw("some")), 400))
    assert len(set(sentences)) > 300
    assert all(sentence[-1] in '."' and not re.search(r"\d", sentence) for sentence in sentences)
    asked_for = {*words.GIVEN, *words.FAMILY, *words.CITIES, *words.STREETS, *words.PETS, *words.CODE_WORDS}
    assert not asked_for & set(re.findall(r"\w+", " ".join(sentences)))


def calibration_words() -> set[str]:
    """The names, places and things that the calibration's facts are made of."""
    lists = ("FIRST", "LAST", "PLACES", "THINGS", "COLOURS", "ROOMS", "TRADES", "MONTHS", "CALLS")
    return {word for name in lists for word in re.findall(r"[\w-]+", getattr(calibration, name).lower())}


def runs_of(text: str, length: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words."""
    found = re.findall(r"\w+", text.lower())
    return zip(*(found[start:] for start in range(length)), strict=False)


def test_names_and_places_are_none_of_the_calibrations() -> None:
    lists = [value for name, value in vars(words).items() if name.isupper()]
    mine = {word.lower() for value in lists for word in value}
    assert len(lists) == 11 and len(mine) > 150 and not mine & calibration_words()


def test_sentences_are_none_of_the_calibrations(texts: dict[str, list[tuple[str, str]]]) -> None:
    prose = " ".join(islice(calibration.fact_prose(0), 400))
    theirs = set(runs_of(prose, 4))
    mine = {run for trials in texts.values() for text, _ in trials for run in runs_of(text, 4)}
    assert len(mine) > 2000 and not mine & theirs


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" 4711.\n\nWhat", True),
        ("\n 4711", True),
        ("the number 4711", True),
        (" 47112", False),
        ("4712\n4711", False),
        ("", False),
    ],
)
def test_a_reply_is_right_with_the_answer_in_its_first_line(reply: str, right: bool) -> None:
    assert Trial([1], "4711").accepts(reply) is right


def test_words_count_in_whatever_case() -> None:
    assert Trial([1], "Falcon").accepts("FALCON!")
    assert not Trial([1], "Falcon").accepts("Falconry")


def test_gaps_share_the_filler() -> None:
    tokenizer = tiny_tokenizer()
    trial = make_trial(Draft(f"{GAP}@{GAP}?", "x", (0.3, 0.7)), Draw("any"), tokenizer, 2000)
    before, after = tokenizer.decode(trial.prompt).split("@")
    assert 0.2 < len(before) / len(before + after) < 0.4


def test_tokens_that_are_too_few_are_an_error() -> None:
    wanted = r"task lists: 40 tokens are too few: without filler it takes \d+; ask for more tokens"
    with pytest.raises(ConfigError, match=wanted):
        make_trials("lists", tiny_tokenizer(), 40, 1, 0)


def test_a_task_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown task 'sums'; choose some of facts, lists, instructions"):
        check_tasks(["facts", "sums"])
    with pytest.raises(ConfigError, match="there is no task to measure; choose some of facts"):
        check_tasks([])
