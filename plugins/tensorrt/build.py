"""Build the plugin library of one model: host code once a machine, then the model's kernels linked in.

The host code declares TensorRT's and the driver's interfaces itself, so a C++ compiler is all it needs; no TensorRT, no
CUDA toolkit. The library has no dependency but libc, and loads on machines without a driver.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from keysieve.errors import ExportError
from keysieve.kernels.triton.aot import PORTABLE, Artifact, default_cache
from keysieve.kernels.triton.configuration import KernelConfiguration, needs_stats
from keysieve.plugins.contract import NODES
from keysieve.plugins.cxx import find_compiler, run, version_of
from keysieve.version import __version__

SOURCES = Path(__file__).parent
# What nodes.cpp passes to each kernel, in this order; behind it Triton's scratch pointers.
PARAMETERS = {
    "score": "keys centre weight length limit position scores batch capacity",
    "select_stats": "scores length limit pinned stats batch capacity",
    "select_plan": "scores stats length limit budget pinned utility ranks plan keep evicted batch capacity",
    "update": "key_new value_new length plan keep key value batch capacity tokens plan_layers layer "
    "key_sequence key_head key_token value_sequence value_head value_token",
}
SCRATCH = ("global_scratch", "profile_scratch")
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-Werror",
    "-ffile-prefix-map={sources}=.",
)  # fmt: skip
LINK_FLAGS = (
    "-shared", "-s", "-static-libstdc++", "-static-libgcc", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--build-id=none",
    "-Wl,--version-script={sources}/exports.map",
)  # fmt: skip
CACHE_TYPES = {"float16": "kHALF", "bfloat16": "kBF16", "float32": "kFLOAT"}


@dataclass(frozen=True)
class _Image:
    """One row of the table in configuration.h."""

    artifact: Artifact
    portable: bool
    exact: bool
    data: bytes


def build_library(
    configuration: KernelConfiguration,
    artifacts: Sequence[Artifact],
    output: Path,
    aliased: bool = False,
    tensorrt_include: Path | None = None,
    cache: Path | None = None,
    compiler: str | None = None,
) -> Path:
    """Write the shared library with the three plugins for `configuration` to `output`; returns it.

    artifacts: every kernel for every architecture, from keysieve.kernels.triton.aot; the PTX of PORTABLE goes along.
    aliased: declare update's outputs as aliases of its inputs, so that one buffer is certain. Without, TensorRT
    compiles one graph instead of one per layer (a smaller plan), and update works in place where the caller binds input
    and output to one buffer.
    tensorrt_include: folder of TensorRT's official headers, to compile against them instead of our declarations.
    cache: where compiled host code is kept between calls. compiler: g++ or clang++, found on PATH if not given.
    Raises ExportError where the compiler is missing or fails, or a kernel has no image.
    """
    _check_artifacts(artifacts, configuration.scope)
    images = _images(artifacts)
    compiler = compiler or find_compiler()
    objects = _host_objects(compiler, _include_flags(tensorrt_include), cache or default_cache("tensorrt-plugin"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "generated.cpp").write_text(_generated(configuration, images, aliased))
        (folder / "images.S").write_text(_assembly(len(images)))
        for index, image in enumerate(images):
            (folder / f"{index}.bin").write_bytes(image.data)
        flags, link = ([flag.format(sources=SOURCES) for flag in group] for group in (FLAGS, LINK_FLAGS))
        run([compiler, *flags, "-I", str(SOURCES), "-c", "generated.cpp", "-o", "generated.o"], folder)
        run([compiler, "-c", "images.S", "-o", "images.o"], folder)
        own = ["generated.o", "images.o"]
        run([compiler, *link, *map(str, objects), *own, "-o", "library.so", "-ldl", "-lpthread"], folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        shutil.copy(folder / "library.so", partial)
        partial.replace(output)
    return output


def _check_artifacts(artifacts: Sequence[Artifact], scope: str) -> None:
    needed = PARAMETERS.keys() - (set() if needs_stats(scope) else {"select_stats"})
    for arch in sorted({artifact.arch for artifact in artifacts}):
        missing = sorted(needed - {artifact.name for artifact in artifacts if artifact.arch == arch})
        if missing:
            raise ExportError(f"no kernel {', '.join(missing)} for sm_{arch}; the plugin library needs it")
    if not artifacts:
        raise ExportError("no kernels given; the plugin library needs them for at least one architecture")
    for artifact in artifacts:
        found = [name for name, _ in artifact.parameters]
        if found != [*PARAMETERS[artifact.name].split(), *SCRATCH]:
            raise ExportError(
                f"kernel {artifact.name} has parameters {found}, the plugin passes {PARAMETERS[artifact.name]}"
            )


def _images(artifacts: Sequence[Artifact]) -> list[_Image]:
    images = []
    for artifact in artifacts:
        exact = re.search(r"^\.target sm_\d+a", artifact.ptx, re.MULTILINE) is not None
        images.append(_Image(artifact, False, exact, artifact.cubin))
        if artifact.arch == PORTABLE:
            images.append(_Image(artifact, True, False, artifact.ptx.encode()))
    return images


def _include_flags(tensorrt_include: Path | None) -> list[str]:
    if tensorrt_include is None:
        return []
    if not (tensorrt_include / "NvInferRuntime.h").is_file():
        raise ExportError(f"{tensorrt_include} has no NvInferRuntime.h; give the include folder of a TensorRT package")
    cuda = _cuda_include()
    # -isystem: warnings about the headers' own code are not ours to fix.
    return ["-DKEYSIEVE_TENSORRT_HEADERS", "-isystem", str(tensorrt_include.resolve()), "-isystem", str(cuda)]


def _cuda_include() -> Path:
    """Folder with cuda_runtime_api.h, which TensorRT's headers include: of nvcc on PATH, or of NVIDIA's wheels."""
    candidates = []
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        tops = [line.split("=", 1)[1].strip() for line in dry_run.splitlines() if line.startswith("#$ TOP=")]
        candidates += [Path(top) / "include" for top in tops]
    from importlib.util import find_spec

    if spec := find_spec("nvidia"):
        for place in spec.submodule_search_locations or ():
            candidates += sorted(Path(place).glob("*/include"))
    for candidate in candidates:
        if (candidate / "cuda_runtime_api.h").is_file():
            return candidate.resolve()
    raise ExportError(
        "TensorRT's headers need cuda_runtime_api.h, which neither nvcc on PATH nor the wheel nvidia-cuda-runtime has; "
        "install one, or build without the official headers"
    )


def _host_objects(compiler: str, includes: list[str], cache: Path) -> list[Path]:
    """Object files of the host code, compiled unless the cache has them for these sources, flags and compiler."""
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = sha256(version_of(compiler).encode())
    for part in (*FLAGS, *includes):
        digest.update(part.encode())
    for file in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(file.name.encode() + file.read_bytes())
    folder = cache / digest.hexdigest()[:24]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        flags = [flag.format(sources=SOURCES) for flag in FLAGS]
        with tempfile.TemporaryDirectory(dir=cache) as partial, ThreadPoolExecutor(max_workers=2) as pool:

            def compile_one(source: Path) -> None:
                target = str(Path(partial) / f"{source.stem}.o")
                run([compiler, *flags, *includes, "-c", str(source), "-o", target], Path(partial))

            list(pool.map(compile_one, sources))
            try:
                shutil.copytree(partial, Path(f"{partial}.done"))
                Path(f"{partial}.done").rename(folder)
            except OSError:
                shutil.rmtree(f"{partial}.done", ignore_errors=True)  # someone else was faster
    return sorted(folder.glob("*.o"))


def _generated(configuration: KernelConfiguration, images: Sequence[_Image], aliased: bool) -> str:
    """C++ definitions of configuration.h's data."""
    c, text = configuration, json.dumps
    sizes = [c.layers, c.query_heads, c.kv_heads, c.head_dim, c.value_dim, c.offsets, c.rotary_dim]
    options = [int(c.interleaved), c.sinks, c.recent, int(aliased), text(c.policy), text(c.scope)]
    values = [*sizes, *options, f"nvinfer1::DataType::{CACHE_TYPES[c.dtype]}"]
    rows = []
    for index, image in enumerate(images):
        a = image.artifact
        rows.append(
            f"    {{{text(a.name)}, {a.arch}, {text(image.portable)}, {text(image.exact)}, image_{index}, "
            f"{len(image.data)}, {text(a.entry)}, {a.num_warps}, {a.shared}, {len(a.parameters)}, "
            f"{a.grid_cells}, {a.grid_rows}, {a.grid_most}}},\n"
        )
    externs = "".join(f"extern unsigned char const image_{index}[];\n" for index in range(len(images)))
    return (
        '#include "configuration.h"\n\n'
        f'extern "C" {{\n{externs}}}\n\n'
        "namespace keysieve {\n\n"
        f"Configuration const configuration = {{{', '.join(map(str, values))}}};\n\n"
        f"Image const images[] = {{\n{''.join(rows)}}};\n"
        f"size_t const imageCount = {len(images)};\n"
        f"char const* const description = {text(text(describe(configuration, images, aliased), sort_keys=True))};\n\n"
        "} // namespace keysieve\n"
    )


def describe(configuration: KernelConfiguration, images: Sequence[_Image], aliased: bool) -> dict[str, object]:
    """What `keysieve_description` of the library returns, as a dict."""
    return {
        "keysieve": __version__,
        "nodes": {node.name: node.version for node in NODES},
        "configuration": asdict(configuration),
        "aliased": aliased,
        "cubins": sorted({image.artifact.arch for image in images if not image.portable}),
        "exact": sorted({image.artifact.arch for image in images if image.exact}),
        "ptx": sorted({image.artifact.arch for image in images if image.portable}),
        "images_sha256": sha256(b"".join(sha256(image.data).digest() for image in images)).hexdigest(),
    }


def _assembly(count: int) -> str:
    """The images as read-only data; PTX ends in a zero byte, as the driver wants it."""
    lines = ['    .section .note.GNU-stack,"",%progbits', "    .section .rodata"]
    for index in range(count):
        name = f"image_{index}"
        lines += [
            f"    .global {name}",
            f"    .hidden {name}",
            "    .balign 64",
            f"{name}:",
            f'    .incbin "{index}.bin"',
        ]
        lines += ["    .byte 0"]
    return "\n".join(lines) + "\n"
