"""Make what the check brings along to a GPU machine: plugin libraries, the driver that calls them, a model's program.

    python benchmarks/gpu/pack.py [FOLDER]        (build/gpu by default; some 8 MB)

Needs this project's environment with Triton and a C++ compiler; no GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import model
from gpu.driver import DRIVER
from gpu.libraries import CASES, CODE
from keysieve.kernels.triton import aot
from keysieve.plugins.cxx import find_compiler, run
from keysieve.plugins.tensorrt.build import SOURCES, build_library

HERE = Path(__file__).parent


def main(folder: Path, cases: tuple[str, ...] = tuple(CASES), tiny: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in cases:
        for kind, architectures in CODE.items():
            kernels = CASES[name].kernels
            build_library(kernels, aot.build(kernels, architectures), folder / f"{name}-{kind}.so")
    sources = [str(HERE / "driver.cpp"), str(SOURCES / "fields.cpp"), "-I", str(SOURCES)]
    run(
        [find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", *sources, "-o", str(folder / DRIVER), "-ldl"], folder
    )
    model.prepare(folder / ("tiny" if tiny else "qwen3-8b"), tiny)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[1] / "build" / "gpu")
