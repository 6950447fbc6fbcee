"""Texts for calibration and comparison, read and cut into tokens in constant memory."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from keysieve.errors import ConfigError

PIECE_CHARACTERS = 1 << 16
FEW_TOKENS = 1_000


def iter_texts(files: Sequence[Path] | None) -> Iterator[str]:
    """The texts of UTF-8 files, in pieces of about 64k characters of whole lines; None: Python's own topics.

    Memory is bounded by one piece, or by the longest line. Raises ConfigError, naming the file, for one that
    is missing (at the call, before any work), unreadable or not UTF-8 (when its turn comes).
    """
    if files is None:
        return _default_texts()
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"there is no text file {file}; give the path of a plain UTF-8 text")
    return (piece for file in files for piece in _pieces(Path(file)))


def token_chunks(texts: Iterable[str], tokenizer: Any, chunk: int, max_tokens: int) -> Iterator[list[int]]:
    """The tokens of all texts on end, without special tokens, in lists of `chunk`; the last may be shorter.

    Stops at max_tokens. Warns when fewer than 1,000 tokens came out; raises ConfigError when none did.
    """
    for name, value in (("chunk", chunk), ("max_tokens", max_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    return _token_chunks(texts, tokenizer, chunk, max_tokens)


def text_sha256(texts: Iterable[str]) -> str:
    """Hash of all texts on end, as UTF-8; where one piece ends and the next begins makes no difference."""
    digest = sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _default_texts() -> Iterator[str]:
    """The language reference that Python's `help()` shows: English prose with some code, on every machine."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _pieces(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            while piece := lines.readlines(PIECE_CHARACTERS):
                yield "".join(piece)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not a UTF-8 text ({error.reason} near byte {error.start}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read the text file {file}: {error.strerror}") from error


def _token_chunks(texts: Iterable[str], tokenizer: Any, chunk: int, max_tokens: int) -> Iterator[list[int]]:
    waiting: list[int] = []
    left = max_tokens
    for text in texts:
        # verbose=False: a text longer than the model's context is no mistake here, it is cut into chunks
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:left]
        left -= len(tokens)
        waiting += tokens
        whole = len(waiting) - len(waiting) % chunk
        for start in range(0, whole, chunk):
            yield waiting[start : start + chunk]
        del waiting[:whole]
        if not left:
            break
    if waiting:
        yield waiting
    _check_amount(max_tokens - left)


def _check_amount(tokens: int) -> None:
    if tokens == 0:
        raise ConfigError("the text holds no tokens; give a longer one")
    if tokens < FEW_TOKENS:
        warnings.warn(
            f"the text has {tokens:,} tokens; with fewer than {FEW_TOKENS:,} the result is mostly noise",
            stacklevel=3,
        )
