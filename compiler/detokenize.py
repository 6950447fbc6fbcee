"""The text of tokens as they come: those whose bytes make up a character only together are one piece."""

from collections.abc import Callable, Iterator, Sequence

Decode = Callable[[Sequence[int]], str]


def new_text(decode: Decode, before: Sequence[int], new: Sequence[int], last: bool) -> str | None:
    """What `new` tokens add to the text of those `before`; None while bytes of a character are to come.

    Both are decoded together, since a token's text can depend on what precedes it. last: nothing is to come.
    """
    text = decode([*before, *new])
    if text.endswith("\ufffd") and not last:
        return None
    return text[len(decode(before)) :]


def pieces(decode: Decode, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(text, how many tokens) of every piece."""
    context = start = 0
    for end in range(1, len(ids) + 1):
        text = new_text(decode, ids[context:start], ids[start:end], end == len(ids))
        if text is not None:
            yield text, end - start
            context, start = start, end
