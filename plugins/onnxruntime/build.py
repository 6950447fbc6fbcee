"""Build and find the custom-op library. It needs a C++ compiler and nothing else; no header of ONNX Runtime.

`pip install` builds it where it finds a compiler, and goes on without where it finds none.
"""

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keysieve.errors import ExportError
from keysieve.plugins.cxx import find_compiler, run

SOURCES = Path(__file__).parent
LIBRARY = "_library.so"
PATTERN = "_library*.so"  # that of `pip install` has the Python version in its name
# As in pyproject.toml. The compiler may join a product and a sum (that is FMA), but reorder nothing.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wno-uninitialized")
LINK_FLAGS = ("-shared", *(("-static-libstdc++", "-static-libgcc") if sys.platform == "linux" else ()))


def build_library(output: Path | None = None, compiler: str | None = None) -> Path:
    """Write the library to `output`, by default where `find_library` looks; returns it.

    compiler: g++ or clang++, found on PATH if not given. Raises ExportError where the compiler is missing or fails, or
    the folder cannot be written.
    """
    compiler = compiler or find_compiler()
    output = output or SOURCES / LIBRARY
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max_workers=2) as pool:
        folder = Path(name)

        def compile_one(source: Path) -> None:
            run([compiler, *FLAGS, "-c", str(source), "-o", f"{source.stem}.o"], folder)

        sources = sorted(SOURCES.glob("*.cpp"))
        list(pool.map(compile_one, sources))
        run([compiler, *LINK_FLAGS, *(f"{source.stem}.o" for source in sources), "-o", LIBRARY], folder)
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / LIBRARY, partial)
            partial.replace(output)
        except OSError as error:
            raise ExportError(f"cannot write {output}: {error.strerror or error}; give another place") from error
        finally:
            partial.unlink(missing_ok=True)
    return output


def find_library() -> Path | None:
    """The newest library of this installation; None if there is none."""
    found = sorted(SOURCES.glob(PATTERN), key=lambda file: file.stat().st_mtime)
    return found[-1] if found else None
