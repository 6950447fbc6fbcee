"""What is installed here, and which targets can be built and run with it."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from keysieve.plugins.cxx import COMPILERS
from keysieve.plugins.onnxruntime.build import find_library
from keysieve.version import __version__

# name shown -> distributions that may provide it
PACKAGES = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "torch_tensorrt": ("torch-tensorrt",),
    "triton": ("triton",),
}
COMPILER = ("torch", "transformers", "onnx", "onnxscript")


def doctor() -> dict[str, Any]:
    """A JSON-ready report; reads package metadata only, so it imports neither torch nor a runtime.

    packages: version or None by name. cpu: logical CPUs of the machine, and those this process may use.
    nvcc: version or None. cxx: the C++ compiler. custom_ops: the library of keysieve's ops for ONNX Runtime, or None.
    gpus: names of NVIDIA GPUs. targets: what can be built and run here, and why not.
    """
    packages = {name: _installed(distributions) for name, distributions in PACKAGES.items()}
    cxx, gpus = next(filter(shutil.which, COMPILERS), None), _gpus()
    return {
        "keysieve": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": {"count": os.cpu_count(), "usable": _usable_cpus()},
        "nvcc": _nvcc(),
        "cxx": cxx,
        "custom_ops": str(library) if (library := find_library()) else None,
        "gpus": gpus,
        "targets": targets(packages, needed_versions(), cxx is not None, bool(gpus)),
    }


def needed_versions() -> dict[str, SpecifierSet]:
    """The versions that keysieve's own metadata asks for, by distribution name, extras included."""
    return {r.name: r.specifier for r in map(Requirement, requires("keysieve") or [])}


def targets(
    packages: dict[str, str | None], needed: dict[str, SpecifierSet], cxx: bool = True, gpu: bool = True
) -> list[dict[str, Any]]:
    """One entry {"target", "build", "run", "reason"} per target; reason is "" where both work."""
    compiler, runtime, openvino, triton, rtx, tensorrt = (
        _missing(names, packages, needed)
        for names in (COMPILER, ("onnxruntime",), ("openvino",), ("triton",), ("tensorrt_rtx",), ("tensorrt",))
    )
    compile_kernels = (compiler, triton, "" if cxx else f"no C++ compiler on PATH ({', '.join(COMPILERS)})")
    no_gpu = "" if gpu else "running needs an NVIDIA GPU"
    return [
        _target("onnx", (compiler,), (runtime and openvino and f"no runtime: {runtime}; {openvino}",)),
        _target("onnxruntime", (compiler,), (runtime,)),
        _target("openvino", (compiler,), (openvino,), note="the inlined ONNX file (--inline)"),
        _target("torch", (compiler,), (), note=_torch_note(triton, gpu)),
        _target("tensorrt-rtx", (*compile_kernels, rtx), (rtx, no_gpu)),
        _target("tensorrt", compile_kernels, (tensorrt and f"{tensorrt}: a script builds the plan elsewhere", no_gpu)),
    ]


def _torch_note(triton: str, gpu: bool) -> str:
    """What the target torch, which runs on any CPU, lacks for a GPU."""
    if not gpu:
        return "on the CPU: there is no NVIDIA GPU"
    return f"on the CPU: {triton}" if triton else ""


def _target(name: str, not_built: tuple[str, ...], not_run: tuple[str, ...], note: str = "") -> dict[str, Any]:
    reason = "; ".join(dict.fromkeys(filter(None, not_built + not_run))) or note
    return {"target": name, "build": not any(not_built), "run": not any(not_run), "reason": reason}


def _missing(names: tuple[str, ...], packages: dict[str, str | None], needed: dict[str, SpecifierSet]) -> str:
    """What keeps these packages from being used, with the command that mends it; "" if nothing does."""
    problems, mend = [], []
    for name in names:
        distribution = next((d for d in PACKAGES[name] if d in needed), PACKAGES[name][0])
        found, wanted = packages[name], needed.get(distribution, SpecifierSet())
        if found is None:
            problems.append(f"{name} is not installed")
        elif not wanted.contains(found, prereleases=True):
            problems.append(f"{name} {found} is installed, {wanted} is needed")
        else:
            continue
        mend.append(f"'{distribution}{wanted}'")
    return f"{', '.join(problems)} (pip install {' '.join(mend)})" if problems else ""


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _usable_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _nvcc() -> str | None:
    match = re.search(r"release [^,]*, V([\d.]+)", _output("nvcc", "--version"))
    return match.group(1) if match else None


def _gpus() -> list[str]:
    lines = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _output(program: str, *arguments: str) -> str:
    """What the program prints; "" where it is absent, fails or hangs: all mean that it is of no use here."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
