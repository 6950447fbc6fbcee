"""translate: an exported program becomes an ONNX model, node by node, through the translations of torch.onnx."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset18 as op  # the one that torch translates to
from torch.export import ExportedProgram

from keysieve.errors import ExportError
from keysieve.plugins.onnx.body import OPSET

Translations = Mapping[Callable[..., Any], Callable[..., Any]]


def translate(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], translations: Translations
) -> ir.Model:
    """The program as an ONNX model of opset OPSET, its inputs and outputs called by the names given.

    translations: torch operation -> function of onnxscript values, beside those that torch.onnx has.
    Raises ExportError where a node has no ONNX form, or an input lost a size that may differ from run to run.
    """
    varying = _varying(program)
    try:
        with _quiet():
            model = _export(program, {**_casts(), **translations})
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"a node of the graph has no ONNX form: {cause}") from error
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    for value, axes in zip(model.graph.inputs, varying, strict=True):
        for axis in axes:
            size = value.shape[axis]  # type: ignore[index]
            fixed = size if isinstance(size, int) else size.value
            if str(fixed).isdigit():  # torch writes even a number as the name of a size
                raise ExportError(
                    f"input {value.name} has {fixed} for size {axis} in the ONNX graph, and may have any: torch "
                    f"{torch.__version__} fixed it on the way; export with a torch that docs/models.md lists"
                )
    return model


def _varying(program: ExportedProgram) -> list[list[int]]:
    """Of each input, the axes along which its size is no number."""
    names = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [[axis for axis, size in enumerate(value.shape) if not isinstance(size, int)] for value in values]


def _export(program: ExportedProgram, translations: Translations) -> ir.Model:
    try:
        from keysieve.export import torch_steps
    except ImportError:  # a torch with other internals: the same in several times the time
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=dict(translations),
            optimize=False,
            verbose=False,
        )
        if made is None:
            raise ExportError("torch.onnx.export returned nothing") from None
        return made.model
    return torch_steps.export(program, translations)


def _casts() -> Translations:
    """What capture leaves of tensor.to(...); torch.onnx knows it in decomposed form only."""

    def cast(tensor: Any, dtype: int) -> Any:
        return op.Identity(tensor) if tensor.dtype == dtype else op.Cast(tensor, to=dtype)

    def to_dtype(tensor: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return cast(tensor, dtype)

    def to_device(tensor: Any, device: str, dtype: int, *_: Any, **__: Any) -> Any:
        return cast(tensor, dtype)

    return {torch.ops.aten.to.dtype: to_dtype, torch.ops.aten.to.device: to_device}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress and its warnings about packages nobody needs here off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
