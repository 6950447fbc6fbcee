"""Compile the kernels for GPUs that need not be there: PTX and machine code, without a driver, cached.

PTX comes from `triton.compile` with an explicit target, machine code from the ptxas that Triton brings; both
are the same bytes every time. The PTX of architecture 80 runs on every later GPU.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from keysieve.errors import ConfigError
from keysieve.kernels.triton.configuration import KernelConfiguration

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PORTABLE = 80  # its PTX is compiled by the driver for a GPU of which there is no machine code
# The lowest PTX version of an architecture is the one that the oldest drivers accept.
PTX_VERSIONS = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 120: 87}
KINDS = {"i32": "int32", "fp32": "float32"}  # of parameters; all others are pointers
PTX_KINDS = {"u32": "int32", "f32": "float32", "u64": "pointer"}
FORMAT = 2  # of the cached files; raised with the fields of Artifact


@dataclass(frozen=True)
class Artifact:
    """One kernel for one architecture, and what a launch needs.

    `parameters` are (name, type) in order, type "pointer", "int32" or "float32"; the last two are Triton's scratch
    pointers, which are null. `constants` holds the kernel's constants as text. The grid has
    min(grid_most, grid_cells * B * ceil(C / grid_rows)) blocks of 32 * num_warps threads, with C the capacity, B the
    batch, and no rows to divide by where grid_rows is 0.
    """

    name: str  # score, select_stats, select_plan or update; attend, which no library holds
    arch: int  # 80, 86, ...: compute capability times ten
    entry: str  # symbol of the kernel
    ptx: str
    cubin: bytes
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, str]
    num_warps: int
    shared: int  # bytes of dynamic shared memory that a launch must give
    grid_cells: int
    grid_rows: int
    grid_most: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # bytes stored and loaded per thread

    @property
    def ptx_version(self) -> str:
        """The PTX version that a driver must know."""
        return _find(r"^\.version (\S+)", self.ptx)


def build(
    model: KernelConfiguration, architectures: Sequence[int] = ARCHITECTURES, cache: Path | None = None
) -> list[Artifact]:
    """score, select_stats (where the scope needs it), select_plan and update of `model` for each architecture.

    `cache` is the folder of finished artefacts, by default `keysieve/kernels` in the user's cache folder.
    Raises ConfigError for an unknown architecture, or if Triton is missing or set to its interpreter.
    """
    unknown = [arch for arch in architectures if arch not in PTX_VERSIONS]
    if unknown:
        known = ", ".join(map(str, PTX_VERSIONS))
        raise ConfigError(f"no GPU kernel can be built for architecture {unknown[0]}; choose from {known}")
    check_triton()
    from keysieve.kernels.triton.variants import variants

    return [build_variant(variant, arch, cache) for arch in architectures for variant in variants(model).values()]


def default_cache(name: str) -> Path:
    """`keysieve/{name}` in the user's cache folder, as the XDG convention has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keysieve" / name


def machine_code_runs(built: int, architecture: int) -> bool:
    """Whether machine code for `built` runs on `architecture`: one of its generation that is not older."""
    return built // 10 == architecture // 10 and built <= architecture


def machine_code_for(architecture: int) -> int:
    """The architecture whose machine code runs on `architecture`: the latest of its generation that is built.

    Raises ConfigError where neither that nor the portable PTX is of use.
    """
    same = [built for built in PTX_VERSIONS if machine_code_runs(built, architecture)]
    if same:
        return max(same)
    if architecture >= PORTABLE:
        return PORTABLE  # its PTX, which the driver compiles
    raise ConfigError(
        f"GPU architecture {architecture} is older than {PORTABLE}, the oldest that the kernels are built for"
    )


def check_triton() -> None:
    """Raise ConfigError unless Triton is there and compiles."""
    try:
        from triton import knobs
    except ImportError as error:
        raise ConfigError(f"building the GPU kernels needs Triton ({error}); `pip install triton`") from error
    if knobs.runtime.interpret:
        raise ConfigError("Triton is set to its interpreter; unset TRITON_INTERPRET to build the GPU kernels")


def build_variant(variant: Any, arch: int, cache: Path | None = None) -> Artifact:
    """One kernel for one architecture, from the cache if it is there; see `build`."""
    folder = cache if cache is not None else default_cache("kernels")
    path = folder / f"{variant.name}-sm{arch}-{_key(variant, arch)}.json"
    if path.is_file():
        return _read(path)
    artifact = _compile(variant, arch)
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(artifact) | {"cubin": base64.b64encode(artifact.cubin).decode()}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)  # complete or not at all, also with several builds at once
    return artifact


def _read(path: Path) -> Artifact:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cubin"] = base64.b64decode(content["cubin"])
    content["parameters"] = tuple((name, kind) for name, kind in content["parameters"])
    return Artifact(**content)


def _key(variant: Any, arch: int) -> str:
    """Hash of all that the bytes depend on: kernel sources, constants, target, compiler and assembler."""
    import triton

    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    described = {field.name: str(getattr(variant, field.name)) for field in fields(variant) if field.name != "kernel"}
    inputs = [FORMAT, arch, PTX_VERSIONS[arch], described, triton.__version__, _ptxas_version()]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for source in sources:
        digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()[:24]


def _compile(variant: Any, arch: int) -> Artifact:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(variant.parameters)
    signature = {name: types.get(name, "constexpr") for name in variant.kernel.arg_names}
    # Every buffer is aligned to 16 bytes, which allows wide loads.
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
        "ptx_version": PTX_VERSIONS[arch],
    }
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = scratch
        knobs.compilation.disable_line_info = True  # it holds the paths of this machine
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise ConfigError(
            f"kernel {variant.name}: Triton {triton.__version__} wants scratch memory, which no launch has"
        )
    cubin, usage = _assemble(ptx)
    if usage["spills"]:
        ptx = _with_register_limit(ptx, 32 * variant.num_warps, variant.max_registers)
        cubin, usage = _assemble(ptx)
    scratch_parameters = [(name, "pointer") for name in ("global_scratch", "profile_scratch")]
    declared = [(name, KINDS.get(kind, "pointer")) for name, kind in variant.parameters]
    parameters = tuple(declared + scratch_parameters)
    found = tuple(PTX_KINDS[size] for size in re.findall(r"\.param \.(u32|u64|f32)", ptx))
    if found != tuple(kind for _, kind in parameters):
        raise ConfigError(f"kernel {variant.name}: Triton {triton.__version__} gave it other parameters: {found}")
    return Artifact(
        name=variant.name,
        arch=arch,
        entry=compiled.metadata.name,
        ptx=ptx,
        cubin=cubin,
        parameters=parameters,
        constants={name: str(value) for name, value in variant.constants.items()},
        num_warps=variant.num_warps,
        shared=compiled.metadata.shared,
        grid_cells=variant.grid.cells,
        grid_rows=variant.grid.rows,
        grid_most=variant.grid.most,
        **usage,
    )


def _with_register_limit(ptx: str, threads: int, registers: int) -> str:
    """The PTX with as many blocks per SM asked for as leave `registers` to every thread.

    Without a number ptxas picks one itself, and may spill a register or two to reach it.
    """
    blocks = 65536 // (registers * threads)
    return re.sub(r"^(\.reqntid .*)$", rf"\1\n.minnctapersm {blocks}", ptx, count=1, flags=re.MULTILINE)


def _assemble(ptx: str) -> tuple[bytes, dict[str, int]]:
    """PTX to machine code by ptxas, and the registers, stack and spills that it reports."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx, encoding="utf-8")
        arch = _find(r"^\.target (\w+)", ptx)
        command = [_ptxas(), "--verbose", f"--gpu-name={arch}", "kernel.ptx", "--output-file=kernel.cubin"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(f"ptxas could not assemble a kernel for {arch}: {result.stderr.strip()}")
        cubin = (Path(folder) / "kernel.cubin").read_bytes()
    bytes_used = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", result.stderr)
    stack, stores, loads = map(int, bytes_used[-3:])
    registers = int(_find(r"Used (\d+) registers", result.stderr))
    return cubin, {"registers": registers, "stack": stack, "spills": stores + loads}


def _ptxas() -> str:
    """The assembler of CUDA 12 that Triton brings: its machine code loads with the drivers of 12 and 13."""
    from triton import knobs

    return knobs.nvidia.ptxas.path


def _ptxas_version() -> str:
    return subprocess.run([_ptxas(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ConfigError(f"the compiler's output holds no {pattern!r}")
    return match.group(1)
