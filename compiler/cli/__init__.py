"""The command line, one verb a file.

Results go to stdout, all else to stderr. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted, 141 the
reader of the output went away. Nothing here imports torch or a runtime before a verb runs.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from keysieve.compiler.cli.parser import build_parser
from keysieve.compiler.cli.terminal import UsageError, quiet_libraries, say, warnings_as_lines
from keysieve.errors import KeySieveError

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (argv None: the program's own arguments) and return its exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except OSError as error:  # a file that no part of keysieve speaks for, or a full disk behind stdout
        say(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        _drop_stdout()
        return 1
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as finished:  # argparse has printed help, version or the mistake
        return int(finished.code or 0)
    try:
        with warnings_as_lines(all_of_them=args.debug):
            if not args.debug:
                quiet_libraries()
            return int(args.run(args))
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "interrupted")
        return INTERRUPTED
    except KeySieveError as error:
        if args.debug:
            traceback.print_exc()
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1


def _drop_stdout() -> None:
    """What is still buffered must not raise once more when Python exits."""
    with suppress(OSError):  # a stdout that is no file needs nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["main"]
