"""Texts for calibration and comparison, read from files or data sets and cut into tokens in constant memory."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keysieve.errors import ConfigError

PIECE_CHARACTERS = 1 << 16
FEW_TOKENS = 1_000
PARQUET_ROWS = 256  # rows held at once
FIELD = "text"

Rows = Iterable[str | Mapping[str, Any]]


def iter_texts(files: Sequence[Path] | None, field: str = FIELD) -> Iterator[str]:
    """The texts of files, in pieces of about 64k characters; None: Python's own topics.

    A .jsonl or .parquet file holds one text a row, in its field (column) `field`; a row that does not end its line
    gets a line end, a null is an empty text. Every other file is one UTF-8 text. Memory is bounded by one piece, or by
    the longest line or row (.parquet: by the file's largest column chunk). Raises ConfigError, naming the file, for one
    that is missing (at the call, before any work), unreadable, not UTF-8 or without that field (when its turn comes).
    """
    if files is None:
        return _default_texts()
    for file in map(Path, files):
        if not file.is_file():
            raise ConfigError(f"there is no text file {file}; give the path of a UTF-8 text, .jsonl or .parquet")
        if file.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ConfigError(f"reading {file} needs pyarrow, which is not installed: pip install 'keysieve[parquet]'")
    return (piece for file in map(Path, files) for piece in _pieces(_READERS.get(file.suffix, _lines)(file, field)))


def iter_rows(rows: Rows, field: str = FIELD) -> Iterator[str]:
    """The texts of a data set, in pieces like those of `iter_texts`: rows are strings, or dicts with a text in `field`.

    Raises ConfigError, naming the row, for anything else.
    """
    return _pieces(_text_of(row, field, f"row {number} of the data set") for number, row in enumerate(rows))


def text_source(
    files: Sequence[Path] | None, dataset: Rows | None = None, field: str = FIELD
) -> Callable[[], Iterator[str]]:
    """A function that starts the texts of `files`, or else of `dataset`, from the beginning, as often as it is called.

    Raises ConfigError where both are given, for a data set that can be read only once, and as `iter_texts` does.
    """
    if dataset is None:
        iter_texts(files, field)  # what is missing shows now
        return lambda: iter_texts(files, field)
    if files is not None:
        raise ConfigError("both texts and dataset are given; give one of them")
    if isinstance(dataset, str) or iter(dataset) is dataset:
        raise ConfigError(
            f"dataset is a {type(dataset).__name__}, but its texts are read more than once (to know them by their "
            "hash); give a list of texts, a datasets.Dataset or any other object that starts anew with every loop"
        )
    return lambda: iter_rows(dataset, field)


def token_chunks(texts: Iterable[str], tokenizer: Any, chunk: int, max_tokens: int) -> Iterator[list[int]]:
    """The tokens of all texts on end, without special tokens, in lists of `chunk`; the last may be shorter.

    Stops at max_tokens. Warns when fewer than 1,000 tokens came out; raises ConfigError when none did.
    """
    for name, value in (("chunk", chunk), ("max_tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    return _token_chunks(texts, tokenizer, chunk, max_tokens)


def count_tokens(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> int:
    """How many tokens `token_chunks` gives."""
    return sum(map(len, _token_lists(texts, tokenizer, max_tokens)))


def text_sha256(texts: Iterable[str]) -> str:
    """Hash of all texts on end, as UTF-8; where one piece ends and the next begins makes no difference."""
    digest = sha256()
    try:
        for text in texts:
            digest.update(text.encode())
    except UnicodeEncodeError as error:  # JSON can hold what UTF-8 cannot
        raise ConfigError(f"a text has {error.object[error.start]!a}, half of a character; remove it") from error
    return digest.hexdigest()


def _default_texts() -> Iterator[str]:
    """The language reference that Python's `help()` shows: English prose with some code, on every machine."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """Lines on end, as many as make a piece: tokenizers are slow on many short texts."""
    waiting: list[str] = []
    size = 0
    for line in lines:
        waiting.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield "".join(waiting)


def _lines(file: Path, _: str) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not a UTF-8 text ({error.reason} near byte {error.start}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read the text file {file}: {error.strerror}") from error


def _json_lines(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, field), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is not JSON ({error}); .jsonl has one object a line") from error
        yield _text_of(row, field, f"{file}, line {number}")


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if field not in names:
                raise ConfigError(f"{file} has no column {field!r}; choose a text field among {', '.join(names)}")
            number = 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _text_of(text, field, f"{file}, row {number}")
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{file} is no readable .parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".jsonl": _json_lines, ".parquet": _parquet}


def _text_of(row: Any, field: str, where: str) -> str:
    """The text of one row, which ends its line unless it is empty."""
    if isinstance(row, Mapping):
        if field not in row:
            raise ConfigError(f"{where} has no field {field!r}; choose a text field among {', '.join(map(str, row))}")
        row = row[field]
    if row is None or row == "":
        return ""
    if not isinstance(row, str):
        raise ConfigError(f"{where}: a text was expected in field {field!r}, not a {type(row).__name__}")
    return row if row.endswith("\n") else row + "\n"


def _token_lists(texts: Iterable[str], tokenizer: Any, max_tokens: int) -> Iterator[list[int]]:
    """The tokens of each text, cut off at max_tokens in all."""
    left = max_tokens
    for text in texts:
        # verbose=False: a text longer than the model's context is no mistake here, it is cut into chunks
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:left]
        left -= len(tokens)
        yield tokens
        if not left:
            break


def _token_chunks(texts: Iterable[str], tokenizer: Any, chunk: int, max_tokens: int) -> Iterator[list[int]]:
    waiting: list[int] = []
    count = 0
    for tokens in _token_lists(texts, tokenizer, max_tokens):
        count += len(tokens)
        waiting += tokens
        whole = len(waiting) - len(waiting) % chunk
        for start in range(0, whole, chunk):
            yield waiting[start : start + chunk]
        del waiting[:whole]
    if waiting:
        yield waiting
    _check_amount(count)


def _check_amount(tokens: int) -> None:
    if tokens == 0:
        raise ConfigError("the text holds no tokens; give a longer one")
    if tokens < FEW_TOKENS:
        warnings.warn(
            f"the text has {tokens:,} tokens; with fewer than {FEW_TOKENS:,} the result is mostly noise",
            stacklevel=3,
        )
