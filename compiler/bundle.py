"""A bundle: the folder that `compile` writes and `load` reads, tied together by manifest.json."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from keysieve.errors import BundleError, KeySieveError

MANIFEST = "manifest.json"
MODEL = "model.onnx"
NATIVE_MODEL = "model.onnxruntime.onnx"  # for ONNX Runtime with the custom-op library
PROGRAM = "program.json"  # of the target torch, and its weights
WEIGHTS = "model.safetensors"
STATISTICS = "stats.safetensors"
STATE = "state.safetensors"
FORMAT = 5
REQUIRED = (
    "format",
    "keysieve",
    "target",
    "model",
    "sizes",
    "dtype",
    "weights",
    "kv_dtype",
    "eviction",
    "layers",
    "files",
    "caches",
    "windows",
    "states",
    "row_states",
    "plans",
    "classes",
    "vocab_size",
)


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def native_model(self) -> Path | None:
        """The file for ONNX Runtime with the custom-op library, where the bundle has one."""
        return self.path / NATIVE_MODEL if NATIVE_MODEL in self.manifest["files"] else None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name only when the block succeeds.

    Raises BundleError where `path` exists already, or where the disk cannot take the files.
    """
    if path.exists():
        raise BundleError(f"output {path} exists already; remove it or choose another name")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise BundleError(f"cannot create {path}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            for folder in missing:
                with suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Hash every file of the folder and write manifest.json, last."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            file.chmod(file.stat().st_mode | 0o444)  # safetensors writes for the owner alone
            files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    text = json.dumps({"format": FORMAT, **content, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def open_bundle(path: Path | str) -> Bundle:
    """Read and check a bundle: format, files, sizes and hashes. Raises BundleError naming the file and the reason."""
    path = Path(path)
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: `keysieve compile MODEL -o {path}` makes one")
    if not file.is_file():
        raise BundleError(f"{path} has no {MANIFEST}, so it is no bundle (or an incomplete one); compile it again")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BundleError(f"{file} cannot be read: {error}; compile the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(
            f"{file} has bundle format {found!r}, this keysieve reads format {FORMAT}; "
            "compile the model again with this version"
        )
    missing = [name for name in REQUIRED if name not in manifest]
    if missing:
        raise BundleError(f"{file} lacks {', '.join(missing)}; compile the bundle again")
    if not isinstance(manifest["files"], dict):
        raise BundleError(f"{file} names no files; compile the bundle again")
    for name, expected in manifest["files"].items():
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise BundleError(f"{file} lacks size and SHA-256 of {name}; compile the bundle again")
        _check_file(path / name, expected)
    return Bundle(path, manifest)


def _check_file(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise BundleError(f"bundle file {file} is missing; compile the bundle again")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise BundleError(
            f"bundle file {file} has {size} bytes instead of {expected['bytes']}: it was truncated or altered"
        )
    if hash_file(file) != expected["sha256"]:
        raise BundleError(f"bundle file {file} was altered: its SHA-256 is not the manifest's")


def hash_file(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise KeySieveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
