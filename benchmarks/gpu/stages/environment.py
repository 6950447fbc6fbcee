"""What the machine is, and how fast it copies."""

import platform
from importlib.metadata import version

import torch

from gpu.place import Place

COPIED = 8 << 30  # bytes read and written


def run(place: Place) -> None:
    found = {name: version(name) for name in ("torch", "triton", "transformers", "numpy")}
    found |= {"python": platform.python_version()}
    moved = 1 << 20 if place.tiny else COPIED
    if not place.tiny:
        properties = torch.cuda.get_device_properties(place.device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_GB": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    place.record("environment", **found, copy_TB_per_s=round(moved / place.copying(moved) / 1e6, 3))
