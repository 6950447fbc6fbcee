"""The C++ compiler of this machine, for the plugin libraries."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from keysieve.errors import ExportError

COMPILERS = ("g++", "c++", "clang++")


def find_compiler() -> str:
    """The first C++ compiler on PATH."""
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise ExportError("no C++ compiler on PATH (g++ or clang++); the plugin library is compiled on this machine")


def version_of(compiler: str) -> str:
    """What the compiler says of itself."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExportError(f"the C++ compiler {compiler} does not run: {error}") from error


def run(command: Sequence[str], folder: Path) -> None:
    """Run the compiler in `folder`. Raises ExportError with its first error."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise ExportError(f"the C++ compiler {command[0]} does not run: {error}") from error
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[-400:])
        raise ExportError(f"building the plugin library failed: {first}\ncommand: {' '.join(command)}")
