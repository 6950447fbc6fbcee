"""What a plugin library is built for, read from the bundle's ONNX file."""

from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from keysieve.errors import ConfigError, ExportError
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.plugins.contract import DOMAIN, SCORE, SELECT, UPDATE

DTYPES: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT: "float32",
}


def read_configuration(model: Path) -> KernelConfiguration:
    """The configuration of an exported model.onnx; weights are not read.

    Raises ExportError where the file cannot be read or holds no plugin nodes (an inlined export), ConfigError where the
    GPU kernels cannot do what it asks for, as with layers of several shapes.
    """
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except (OSError, ValueError) as error:
        raise ExportError(f"{model} cannot be read: {error}") from error
    except Exception as error:
        raise ExportError(f"{model} is no ONNX file: {error}") from error
    found: dict[str, list[NodeProto]] = {node.name: [] for node in (UPDATE, SCORE, SELECT)}
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in found:
            found[node.op_type].append(node)
    missing = [name for name, nodes in found.items() if not nodes]
    if missing:
        raise ExportError(f"{model} has no {', '.join(missing)} node; compile the bundle again without --inline")
    if len(found[SCORE.name]) > 1:
        raise ConfigError(
            f"{model} has {len(found[SCORE.name])} {SCORE.name} nodes, one for each shape of layers that evict; the "
            "plugin library has kernels for one shape: run the bundle in ONNX Runtime"
        )
    score, select = found[SCORE.name][0], found[SELECT.name][0]
    shapes = _shapes(graph)
    key, value = (shapes[name] for name in found[UPDATE.name][0].input[5:7])
    centre = shapes.get(score.input[3])
    if centre is None:
        raise ExportError(f"{model} does not say the shape of {score.input[3]}, input centre of {SCORE.name}")
    return KernelConfiguration.of_nodes(
        _attributes(score) | _attributes(select),
        layers=len(score.input) - len(SCORE.inputs) + 1,
        head_dim=key[1][3],
        value_dim=value[1][3],
        offsets=centre[1][3],
        dtype=DTYPES.get(key[0], helper.tensor_dtype_to_string(key[0])),
    )


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, list[Any]]]:
    """Dtype and shape (0 for a dynamic size) of every value that the file describes."""
    result = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        result[info.name] = (tensor.elem_type, [size.dim_value for size in tensor.shape.dim])
    for constant in graph.initializer:
        result[constant.name] = (constant.data_type, list(constant.dims))
    return result


def _attributes(node: NodeProto) -> dict[str, Any]:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
