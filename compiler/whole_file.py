"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from keysieve.errors import StatisticsError


def existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise StatisticsError(f"{path} is a folder; name the statistics file itself")
    if not path.is_file():
        raise StatisticsError(f"{path}: no such file; make it with `keysieve calibrate MODEL -o {path}`")
    return path


def write_whole(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Call writer(temporary path) in the target's folder, then move the result into place.

    Raises StatisticsError if that cannot be done.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save
        raise StatisticsError(f"cannot write {path} ({error}); choose a folder that is writable") from error
    finally:
        temporary.unlink(missing_ok=True)
