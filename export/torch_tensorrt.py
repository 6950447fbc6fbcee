"""Converters for torch-tensorrt: torch.ops.keysieve.update, score and select become the TensorRT plugins.

Untested: torch-tensorrt does not import on a machine without a GPU. Import this module after torch_tensorrt, and load
the plugin library into TensorRT's registry before compiling.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import keysieve.plugins.torch.ops  # noqa: F401  (registers torch.ops.keysieve)
from keysieve.errors import ExportError
from keysieve.plugins.contract import NAMESPACE, NODES, PluginNode


def register_converters() -> None:
    """Register the three converters with torch-tensorrt; raises ExportError where it is not installed."""
    try:
        from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter
    except ImportError as error:
        raise ExportError(f"torch-tensorrt cannot be imported ({error}); install it on a machine with a GPU") from error
    for node in NODES:
        operator = getattr(torch.ops.keysieve, node.name.removeprefix("KeySieve").lower()).default
        dynamo_tensorrt_converter(operator, supports_dynamic_shapes=True)(_converter(node))


def _converter(node: PluginNode) -> Any:
    def convert(context: Any, target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
        from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

        fixed = len(node.required) - node.inputs[-1].variadic
        tensors = [*args[:fixed], *(args[fixed] if node.inputs[-1].variadic else [])]
        values = args[fixed + node.inputs[-1].variadic :]
        inputs = [get_trt_tensor(context, tensor, f"{name}_{index}") for index, tensor in enumerate(tensors)]
        layer = context.net.add_plugin_v3(
            inputs, [], plugin(node, name, dict(zip(node.attributes, values, strict=True)))
        )
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        return outputs if len(outputs) > 1 else outputs[0]

    return convert


def plugin(node: PluginNode, name: str, attributes: dict[str, Any]) -> Any:
    """The IPluginV3 of a node, from TensorRT's registry. Raises ExportError where the library is not loaded."""
    import tensorrt as trt

    creator = trt.get_plugin_registry().get_creator(node.name, node.version, NAMESPACE)
    if creator is None:
        raise ExportError(
            f"TensorRT knows no plugin {node.name} {node.version}; load the plugin library into its registry"
        )
    fields = []
    for key, value in attributes.items():
        if isinstance(value, str):
            fields.append(trt.PluginField(key, value.encode(), trt.PluginFieldType.CHAR))
        else:
            fields.append(trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32))
    made = creator.create_plugin(name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    if made is None:
        raise ExportError(f"plugin {node.name} refuses {attributes}; its reason is on stderr")
    return made
