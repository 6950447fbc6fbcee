"""Weights read from a model's safetensors files one at a time, for models that do not fit into memory."""

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from keysieve.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
ITEM_BYTES = 4  # float32, in which everything is calibrated
HEADROOM = 1.2  # activations, the allocator, and the libraries themselves


@dataclass
class _Source:
    """Where a tensor of the model comes from: entries (source pattern, key) of the files, and what makes it of them."""

    converter: Any = None
    entries: list[tuple[str, str]] = field(default_factory=list)


class Checkpoint:
    """The tensors of a model by their names in it, read on demand.

    Names and layouts in the files that differ from the model's (other prefixes, experts one by one) go through
    transformers' own tables, as in `from_pretrained`. Raises CaptureError, naming it, for a parameter that the files
    do not hold, at once, and for one that is quantized or of another shape, when it is read.
    """

    def __init__(self, model: str | Path, skeleton: "PreTrainedModel"):
        """`model` as the user gave it; `skeleton` the same model without weights (see load_skeleton)."""
        self.model = model
        self._skeleton = skeleton
        if getattr(skeleton.config, "quantization_config", None) is not None:
            raise CaptureError(f"{model} is quantized, and is dequantized as a whole only; {_WHOLE}")
        files = safetensors_files(model)
        if files is None:
            raise CaptureError(f"{model} has no {SINGLE} and no {INDEX}; {_WHOLE}")
        self._files = {key: file for file in files for key in _keys(file)}
        self._empty = skeleton.state_dict()
        self._sources = self._find_sources()
        self._tied = _tied_names(skeleton)
        missing = [name for name, _ in skeleton.named_parameters() if self._source(name) is None]
        if missing:
            raise CaptureError(
                f"{model}: parameter {missing[0]} is not in its safetensors files"
                f"{f' (nor are {len(missing) - 1} others)' if missing[1:] else ''}; {_WHOLE}"
            )

    def read(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name, in the shape and dtype that it has in the skeleton."""
        source = self._source(name)
        if source is None:
            raise CaptureError(f"{self.model}: {name} is not in its safetensors files; {_WHOLE}")
        wanted = self._empty[name]
        tensor = self._convert(name, source, wanted.dtype)
        if tensor.shape != wanted.shape:
            raise CaptureError(
                f"{self.model}: {name} is {list(tensor.shape)} in {self._files[source.entries[0][1]]} and "
                f"{list(wanted.shape)} in the model; {_WHOLE}"
            )
        return tensor.to(wanted.dtype)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter once, sorted by name; of tied ones the name that the skeleton gives them."""
        return ((name, self.read(name)) for name, _ in sorted(self._skeleton.named_parameters()))

    def _find_sources(self) -> dict[str, _Source]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(self._skeleton)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._skeleton.base_model_prefix
        sources: dict[str, _Source] = {}
        for key in sorted(self._files, key=dot_natural_key):  # the order in which transformers stacks experts
            target, pattern = rename_source_key(key, renamings, converters, prefix, self._empty)
            if target not in self._empty and key in self._empty:
                target, pattern = rename_source_key(key, [], [], prefix, self._empty)
            source = sources.setdefault(target, _Source(by_pattern.get(pattern)))
            source.entries.append((pattern or key, key))
            if source.converter is not None:
                first, *others = source.converter.target_patterns
                for other in others:  # one entry of the file that becomes several tensors
                    sources.setdefault(target.replace(first, other), source)
        return sources

    def _source(self, name: str) -> _Source | None:
        for known in (name, *self._tied.get(name, ())):
            if known in self._sources:
                return self._sources[known]
        return None

    def _convert(self, name: str, source: _Source, dtype: torch.dtype) -> torch.Tensor:
        if source.converter is None:
            return self._raw(source.entries[-1][1])
        converter = deepcopy(source.converter)
        for pattern, key in source.entries:
            converter.add_tensor(name, key, pattern, self._raw(key).to(dtype))
        converted = converter.convert(name, model=self._skeleton, config=self._skeleton.config)
        if name not in converted:
            raise CaptureError(f"{self.model}: transformers does not make {name} of {source.entries[0][1]}; {_WHOLE}")
        value = converted[name]
        return value[0] if isinstance(value, list) else value

    def _raw(self, key: str) -> torch.Tensor:
        file = self._files[key]
        try:
            with safe_open(file, framework="pt") as opened:
                dtype = opened.get_slice(key).get_dtype()
                if dtype not in FLOATS:
                    raise CaptureError(f"{file}: {key} is of type {dtype}, which is no plain float; {_WHOLE}")
                return opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CaptureError(f"cannot read {key} of {file}: {error}") from error


_WHOLE = "such a model has to be loaded whole (--no-layer-by-layer)"


def safetensors_files(model: str | Path) -> list[Path] | None:
    """The safetensors files of a hub name (fetched if need be) or folder; None where there are none."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    if Path(model).suffix == ".gguf":
        return None
    try:
        for name in (SINGLE, INDEX):
            found = cached_file(str(model), name, _raise_exceptions_for_missing_entries=False)
            if found and name == INDEX:
                return [Path(file) for file in get_checkpoint_shard_files(str(model), found)[0]]
            if found:
                return [Path(found)]
    except (OSError, ValueError) as error:
        raise CaptureError(f"cannot find the weights of {model}: {error}") from error
    return None


def weights_bytes(files: list[Path]) -> int:
    """What the weights in these files take in float32."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            total += sum(prod(opened.get_slice(key).get_shape()) for key in opened.keys()) * ITEM_BYTES  # noqa: SIM118
    return total


def free_memory() -> int:
    """Bytes of memory that this process may still take: the machine's, or those of its container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in _CONTAINER_LIMITS:
        if limit.is_file() and limit.read_text().strip().isdecimal():
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


_CONTAINER = Path("/sys/fs/cgroup")
_CONTAINER_LIMITS = (
    (_CONTAINER / "memory.max", _CONTAINER / "memory.current"),
    (_CONTAINER / "memory" / "memory.limit_in_bytes", _CONTAINER / "memory" / "memory.usage_in_bytes"),
)


def too_large(model: str | Path, processes: int) -> str | None:
    """Why the model cannot be loaded whole by that many processes of this machine, or None where it can."""
    files = safetensors_files(model)
    if files is None:
        return None
    needed, free = int(weights_bytes(files) * HEADROOM) * processes, free_memory()
    if needed <= free:
        return None
    times = f" in each of {processes} processes" if processes > 1 else ""
    return f"it would take {needed / processes / 1e9:.1f} GB of memory{times}, and {free / 1e9:.1f} GB are free"


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CaptureError(f"cannot read the weights file {file}: {error}") from error


def _tied_names(model: "PreTrainedModel") -> dict[str, list[str]]:
    """For every parameter with several names: name -> all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}
