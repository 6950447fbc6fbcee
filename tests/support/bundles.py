"""Tiny models on disk, calibrated and compiled once a session and root.

Give `tmp_path_factory.getbasetemp() / "tiny"` as root, so that all modules of a session share them.
"""

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler import statistics_file
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig
from keysieve.compiler.progress import Progress
from support.tiny_models import save_tiny

CALIBRATION_TOKENS = 1536
QUIET = Progress(quiet=True)

_bundles: dict[Any, Path] = {}


def tiny_folder(name: str, root: Path) -> Path:
    """Folder of that tiny model, as MODEL is given."""
    folder = root / "models" / name
    return folder if folder.exists() else save_tiny(name, folder)


def tiny_statistics(name: str, root: Path) -> Path:
    """Statistics file of that tiny model, calibrated on CALIBRATION_TOKENS tokens of the default text."""
    file = root / "statistics" / f"{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        calibrate(tiny_folder(name, root), file, max_tokens=CALIBRATION_TOKENS, chunk=512, progress=QUIET, gates=False)
    return file


def tiny_centres(name: str, root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same statistics as the masked reference takes them: per layer q_mean [Hq,D] and q_abs [Hq,R/2]."""
    return [(layer.q_mean, layer.q_abs) for layer in statistics_file.load(tiny_statistics(name, root)).layers]


def tiny_bundle(name: str, eviction: EvictionConfig, root: Path, **compile_options: Any) -> Path:
    """Bundle of that tiny model, compiled on the first call with these arguments.

    compile_options: those of CompileConfig; `stats` is tiny_statistics(name, root) where the policy needs it. Tests
    must leave the folder as it is.
    """
    key = (name, astuple(eviction), tuple(sorted(compile_options.items())), root)
    if key not in _bundles:
        if eviction.policy.needs_statistics:
            compile_options = {"stats": tiny_statistics(name, root), **compile_options}
        output = root / "bundles" / f"{len(_bundles)}-{name}"
        compile(tiny_folder(name, root), output, CompileConfig(eviction, **compile_options), progress=QUIET)
        _bundles[key] = output
    return _bundles[key]
