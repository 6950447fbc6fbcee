"""The text of tokens: characters of several tokens are one piece."""

from keysieve.compiler.detokenize import pieces
from support.tiny_models import tiny_tokenizer


def test_the_bytes_of_one_character_are_one_piece() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("x \N{GRINNING FACE} y")["input_ids"]
    found = list(pieces(tokenizer.decode, ids))
    assert "".join(text for text, _ in found) == "x \N{GRINNING FACE} y"
    assert sum(count for _, count in found) == len(ids)
    assert any("\N{GRINNING FACE}" in text and count > 1 for text, count in found)
