"""Texts and token chunks: nothing lost, nothing doubled, constant memory, clear errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from keysieve.compiler import text as module
from keysieve.compiler.text import count_tokens, iter_rows, iter_texts, text_sha256, text_source, token_chunks
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


# Rows: .jsonl, .parquet and data sets

TEXTS = ["A first text.", "", "A second one, café,\nof two lines.\n", None, "The last."]
JOINED = "A first text.\nA second one, café,\nof two lines.\nThe last.\n"


class Endless:
    """A data set that starts anew with every loop, and counts the rows that were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        while True:
            self.asked += 1
            yield {"body": "x" * 99}


def json_lines(file: Path, field: str = "text") -> Path:
    file.write_text("".join(json.dumps({"id": 1, field: text}) + "\n\n" for text in TEXTS), encoding="utf-8")
    return file


def parquet(file: Path, field: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'keysieve[parquet]'")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"id": list(range(len(TEXTS))), field: TEXTS}), file, row_group_size=2)
    return file


def test_rows_are_the_same_text_in_every_format(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text(JOINED, encoding="utf-8")
    assert "".join(iter_texts([plain])) == JOINED
    assert "".join(iter_texts([json_lines(tmp_path / "a.jsonl")])) == JOINED
    assert "".join(iter_texts([json_lines(tmp_path / "b.jsonl", "body")], "body")) == JOINED
    assert "".join(iter_rows(TEXTS)) == JOINED
    assert "".join(iter_rows([{"body": text} for text in TEXTS], "body")) == JOINED


def test_parquet_rows_are_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARQUET_ROWS", 2)
    assert "".join(iter_texts([parquet(tmp_path / "a.parquet")])) == JOINED
    assert "".join(iter_texts([parquet(tmp_path / "b.parquet", "body")], "body")) == JOINED
    with pytest.raises(ConfigError, match=r"a\.parquet has no column 'body'; choose a text field among id, text"):
        list(iter_texts([tmp_path / "a.parquet"], "body"))
    with pytest.raises(ConfigError, match=r"a\.parquet, row 0: a text was expected in field 'id', not a int"):
        list(iter_texts([tmp_path / "a.parquet"], "id"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"a\.parquet is no readable \.parquet file"):
        list(iter_texts([tmp_path / "a.parquet"]))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a\.parquet needs pyarrow, .*pip install 'keysieve\[parquet\]'"):
        iter_texts([tmp_path / "a.parquet"])


def test_rows_are_read_no_further_than_needed() -> None:
    rows = Endless()
    found = list(token_chunks(iter_rows(rows, "body"), Characters(), 512, 1024))
    assert [len(part) for part in found] == [512, 512]
    assert rows.asked <= module.PIECE_CHARACTERS // 100 + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "good"}\n{"text": \n', r"rows\.jsonl, line 2 is not JSON"),
        ('{"body": "x"}\n', r"rows\.jsonl, line 1 has no field 'text'; choose a text field among body"),
        ("\n[3]\n", r"rows\.jsonl, line 2: a text was expected in field 'text', not a list"),
        ('{"text": 3}\n', r"rows\.jsonl, line 1: a text was expected in field 'text', not a int"),
    ],
)
def test_a_bad_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match=message):
        list(iter_texts([file]))
    with pytest.raises(ConfigError, match="row 1 of the data set: a text was expected"):
        list(iter_rows(["good", b"bad"]))


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "\ud800"}))
    with pytest.raises(ConfigError, match=r"'\\ud800', half of a character"):
        text_sha256(iter_texts([tmp_path / "rows.jsonl"]))


def test_a_source_starts_again_as_often_as_it_is_called(tmp_path: Path) -> None:
    file = json_lines(tmp_path / "a.jsonl")
    for source in (text_source([file]), text_source(None, TEXTS), text_source(None, [{"body": JOINED}], "body")):
        assert "".join(source()) == "".join(source()) == JOINED
    assert text_sha256(text_source(None)()) == text_sha256(iter_texts(None))


def test_a_source_that_cannot_start_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is a generator, but its texts are read more than once"):
        text_source(None, (text for text in TEXTS))
    with pytest.raises(ConfigError, match="dataset is a str"):
        text_source(None, "one text")
    with pytest.raises(ConfigError, match="both texts and dataset"):
        text_source([json_lines(tmp_path / "a.jsonl")], TEXTS)
    with pytest.raises(ConfigError, match=r"no\.jsonl"):
        text_source([tmp_path / "no.jsonl"])


def test_tokens_are_counted_before_they_are_cut() -> None:
    assert count_tokens(["a" * 700, "", "b" * 700], Characters(), 10**6) == 1400
    assert count_tokens(["a" * 700, "b" * 700], Characters(), 800) == 800
    assert count_tokens([""], Characters(), 800) == 0
