"""Tiny float16 bundles; weights are rounded to float16 first, so that the statistics belong to the same model."""

from pathlib import Path

from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig
from keysieve.compiler.progress import Progress
from support.tiny_models import save_tiny, tiny_model

EVICTION = EvictionConfig(budget=48, interval=16, sinks=2, recent=8)
QUIET = Progress(quiet=True)


def half_bundle(name: str, root: Path) -> Path:
    """The tiny model of that name, compiled with EVICTION in float16; made on the first call with this root."""
    folder = root / name
    if not (folder / "bundle").exists():
        model = save_tiny(name, folder / "model")
        tiny_model(name).half().float().save_pretrained(model)
        statistics = folder / "statistics.safetensors"
        calibrate(model, statistics, max_tokens=1024, chunk=512, progress=QUIET)
        compile(model, folder / "bundle", CompileConfig(EVICTION, "float16", statistics), progress=QUIET)
    return folder / "bundle"
