"""A trial: a prompt of a wanted number of tokens that ends where the answer begins, and the answer."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from keysieve.compiler.memory.filler import filler
from keysieve.compiler.memory.words import Draw
from keysieve.errors import ConfigError

GAP = "\ufffc"  # stands for filler in a draft; no text has it
TOLERANCE = 0.02  # of the wanted tokens


@dataclass(frozen=True)
class Draft:
    """What a task writes, without its filler.

    text: ends where the answer begins, with GAP where filler goes; answer: what must come then. shares: of the filler,
    one a gap. turns: those of a chat before text, by role and content, with gaps too. filler: what gives its sentences.
    """

    text: str
    answer: str
    shares: Sequence[float] = (1.0,)
    turns: Sequence[tuple[str, str]] = ()
    filler: Callable[[Draw], Iterator[str]] = filler


@dataclass(frozen=True)
class Trial:
    """prompt: token ids; a reply is right where its first line has `answer`."""

    prompt: list[int]
    answer: str

    def accepts(self, reply: str) -> bool:
        """Whether the first line of a reply has the answer, as whole words and in whatever case."""
        line = (reply.strip().splitlines() or [""])[0]
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", line, re.IGNORECASE) is not None


def make_trial(draft: Draft, draw: Draw, tokenizer: Any, tokens: int) -> Trial:
    """Fill a draft's gaps so that it has `tokens` tokens, within 2 %.

    Raises ConfigError where its own text takes more.
    """
    text, special = _rendered(draft, tokenizer)
    pieces = text.split(GAP)
    sentences = [_sentences(draft.filler(draw), tokens) for _ in draft.shares]

    def encode(words: int) -> list[int]:
        fills = _fills(sentences, draft.shares, words)
        whole = "".join(part for pair in zip(pieces, [*fills, ""], strict=True) for part in pair)
        ids: list[int] = tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    low, high = 0, tokens + 1  # words: no tokenizer makes less than a token of one
    prompt = encode(low)
    while high - low > 1:
        middle = (low + high) // 2
        ids = encode(middle)
        if len(ids) <= tokens:
            low, prompt = middle, ids
        else:
            high = middle
    if abs(len(prompt) - tokens) > max(1.0, TOLERANCE * tokens):
        raise ConfigError(f"{tokens} tokens are too few: without filler it takes {len(encode(0))}; ask for more tokens")
    return Trial(prompt, draft.answer)


def _sentences(stream: Iterator[str], words: int) -> list[list[str]]:
    """Sentences of a stream as lists of words, of at least so many words in all."""
    result: list[list[str]] = []
    for sentence in stream:
        if words <= 0:
            break
        result.append(sentence.split())
        words -= len(result[-1])
    return result


def _fills(sentences: Sequence[Sequence[list[str]]], shares: Sequence[float], words: int) -> list[str]:
    """Filler for every gap, of `words` words in all: whole sentences, but the last gap's end is cut."""
    left, result = words, []
    for number, (stream, share) in enumerate(zip(sentences, shares, strict=True)):
        wanted = left if number == len(shares) - 1 else min(left, round(share * words))
        taken: list[str] = []
        for sentence in stream:
            if len(taken) >= wanted:
                break
            taken += sentence
        taken = taken[:left]
        left -= len(taken)
        result.append(_ended(" ".join(taken if number < len(shares) - 1 else taken[:wanted])))
    return result


def _ended(text: str) -> str:
    """The text with a full stop where it was cut."""
    return text if not text or text.endswith((".", '"')) else text.rstrip(",") + "."


def _rendered(draft: Draft, tokenizer: Any) -> tuple[str, bool]:
    """The whole text with its gaps, and whether the tokenizer adds its special tokens.

    Turns follow the model's chat template, and are a plain dialogue where it has none that takes them.
    """
    if not draft.turns:
        return draft.text, True
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in draft.turns]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError:
            text = ""
        if text.count(GAP) == len(draft.shares):
            return text + draft.text, False
    lines = [f"{role.capitalize()}: {content}\n\n" for role, content in draft.turns]
    return "".join(lines) + f"Assistant: {draft.text}", True
