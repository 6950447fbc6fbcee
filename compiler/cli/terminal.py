"""What all verbs print in the same way: lines on stderr, tables and sizes on stdout, libraries kept silent."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keysieve.errors import ConfigError, KeySieveError


class UsageError(KeySieveError):
    """Options that cannot work; the exit code is 2, as for those that argparse refuses."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Around the making of config objects from options: what they refuse is a mistake in usage."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(str(error)) from error


def say(text: str) -> None:
    """One message on stderr."""
    print(f"keysieve: {text}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """One result on stdout."""
    print(text, flush=True)


def show_json(value: Any) -> None:
    """One JSON object on stdout."""
    show(json.dumps(value, indent=1))


def show_report(report: Any, text: str, as_json: bool, output: Path | None) -> None:
    """A report as text or as one JSON object on stdout, and as JSON in `output`, if that is given.

    Printed first: a disk that cannot take the file must not cost the result. Raises KeySieveError where it cannot.
    """
    if as_json:
        show_json(report)
    else:
        show(text)
    if output is not None:
        write_result(output, json.dumps(report, indent=1) + "\n")


def write_result(path: Path, text: str, option: str = "-o") -> None:
    """Write the whole file or nothing. Raises KeySieveError, naming the option, where that cannot be done."""
    from keysieve.compiler.bundle import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        raise KeySieveError(f"cannot write {path}: {error.strerror or error}; choose another {option}") from error


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of equal length, aligned in columns; those listed in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def human_bytes(count: int) -> str:
    """1536 -> "1.5 kB"; decimal units, as disks and `ls --si` count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


@contextmanager
def warnings_as_lines(all_of_them: bool = False) -> Iterator[None]:
    """Print Python warnings as one line each; only keysieve's own unless told otherwise."""

    def one_line(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {message}")

    with warnings.catch_warnings():
        if not all_of_them:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"keysieve\.")
        warnings.showwarning = one_line
        yield


def quiet_libraries() -> None:
    """Loggers that nobody configured report errors only."""
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """No notes and no progress bars of transformers and its hub client. Imports transformers."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
