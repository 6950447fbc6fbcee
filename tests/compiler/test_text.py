"""Texts and token chunks: nothing lost, nothing doubled, constant memory, clear errors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from keysieve.compiler import text as module
from keysieve.compiler.text import iter_texts, text_sha256, token_chunks
from keysieve.errors import ConfigError


class Characters:
    """A tokenizer whose tokens are code points."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def chunks(texts: list[str], chunk: int, max_tokens: int = 10**6) -> list[list[int]]:
    return list(token_chunks(texts, Characters(), chunk, max_tokens))


def test_files_are_read_whole_in_order_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    contents = ["".join(f"line {n} of file {f}, café\n" for n in range(50)) for f in range(2)]
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content, encoding="utf-8")
    pieces = list(iter_texts(files))
    assert "".join(pieces) == "".join(contents)
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces)


def test_default_text_is_the_same_every_time() -> None:
    assert text_sha256(iter_texts(None)) == text_sha256(iter_texts(None))
    assert sum(len(text) for text in iter_texts(None)) > 300_000


def test_hash_does_not_depend_on_the_pieces() -> None:
    assert text_sha256(["ab", "c"]) == text_sha256(["a", "bc"]) != text_sha256(["abd"])


def test_a_missing_file_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.txt"):
        iter_texts([tmp_path / "no.txt"])


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not a UTF-8 text"):
        list(iter_texts([file]))


@pytest.mark.parametrize("lengths", [(3000,), (1, 1998, 1, 1000), (500, 0, 2500), (1024, 1024, 952)])
def test_chunks_hold_every_token_once(lengths: tuple[int, ...]) -> None:
    stream = "".join(chr(97 + n % 26) for n in range(sum(lengths)))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    found = chunks([stream[a : a + n] for a, n in zip(starts, lengths, strict=True)], chunk=512)
    assert [len(part) for part in found] == [512] * 5 + [440]
    assert [token for part in found for token in part] == [ord(c) for c in stream]


def test_max_tokens_is_exact_and_stops_reading() -> None:
    def texts() -> Iterator[str]:
        yield "a" * 1000
        yield "b" * 1000
        raise AssertionError("read on after max_tokens")

    found = list(token_chunks(texts(), Characters(), 512, 1500))
    assert [len(part) for part in found] == [512, 512, 476]


def test_a_short_text_warns() -> None:
    with pytest.warns(UserWarning, match="999 tokens"):
        assert len(chunks(["a" * 999], 512)) == 2


def test_a_text_without_tokens_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        chunks([""], 512)


@pytest.mark.parametrize(("chunk", "max_tokens", "name"), [(0, 10, "chunk"), (10, 0, "max_tokens")])
def test_sizes_below_one_are_refused_at_the_call(chunk: int, max_tokens: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        token_chunks([], Characters(), chunk, max_tokens)
