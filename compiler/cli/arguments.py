"""Types of command-line values, and options that several verbs share."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, _ArgumentGroup
from pathlib import Path
from typing import Any

from keysieve.compiler.cli.terminal import UsageError
from keysieve.compiler.progress import Progress
from keysieve.errors import ConfigError


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def positive_list(text: str) -> list[int]:
    """Numbers like `positive`, separated by commas; repeated ones count once."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


def prompt_text(text: str) -> str:
    """What --prompt means: the text itself, @FILE a file's text, - the text on stdin.

    One newline at the end of a file or of stdin is dropped. Raises ConfigError for a file that cannot be read.
    """
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode().removesuffix("\n")
        if text.startswith("@"):
            return Path(text[1:]).read_text(encoding="utf-8-sig").removesuffix("\n")
        text.encode()
    except OSError as error:
        raise ConfigError(
            f"cannot read the prompt file {text[1:]!r}: {error.strerror}; give --prompt TEXT, --prompt @FILE, "
            "or --prompt - for the text on stdin (which may start with @)"
        ) from error
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"the prompt is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    return text


def output_file(path: Path, option: str = "-o") -> Path:
    """The path of a result, refused before the work if it cannot become a file."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; create it first")
    return path


def given(args: Namespace, *names: str) -> dict[str, Any]:
    """Keyword arguments from the options of these names, without those that were left out."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


ENGINE = ("threads", "device", "compiled")  # what add_engine_options adds: keywords of keysieve.load


def add_engine_options(parser: ArgumentParser | _ArgumentGroup) -> None:
    """Where and how a bundle runs, for verbs that run one."""
    parser.add_argument("--threads", metavar="N", type=positive, help="CPU threads (default: all it may use)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="cuda: an NVIDIA GPU, for targets torch and tensorrt (default cpu)"
    )
    parser.add_argument(
        "--compile",
        dest="compiled",
        action="store_true",
        default=None,
        help="target torch: let torch.compile fuse the decoding step, which takes about a minute once",
    )


def add_report_options(parser: ArgumentParser) -> None:
    """What terminal.show_report does, and the engine's options, for verbs that measure one."""
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the report there too, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_options(parser)
    add_quiet(parser)


def add_library_options(parser: ArgumentParser | _ArgumentGroup) -> None:
    """How a TensorRT plugin library is built, for verbs that build one; keywords of TensorRTConfig."""
    parser.add_argument(
        "--arch",
        dest="architectures",
        metavar="SM,...",
        type=lambda text: tuple(positive_list(text)),
        help="GPU architectures, such as 86,89 (default: all)",
    )
    parser.add_argument(
        "--aliased",
        action="store_true",
        default=None,
        help="tell TensorRT that caches are updated in place: it then checks that, and plans are larger",
    )
    parser.add_argument(
        "--tensorrt-include",
        dest="include",
        metavar="DIR",
        type=Path,
        help="compile the plugin against TensorRT's official headers in DIR",
    )


def add_quiet(parser: ArgumentParser) -> None:
    """--quiet, for verbs that take their time."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def progress_of(args: Namespace) -> Progress:
    """Where this verb's progress goes."""
    return Progress(quiet=args.quiet)
