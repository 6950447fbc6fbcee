"""ONNX Runtime with the custom-op library, for graphs of a few nodes."""

from collections.abc import Sequence

import onnxruntime as ort
from onnx import NodeProto, ValueInfoProto, helper

from keysieve.plugins.contract import DOMAIN
from keysieve.plugins.onnx.body import OPSET
from keysieve.plugins.onnxruntime.build import find_library


def library_session(
    nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto], threads: int = 1
) -> ort.InferenceSession:
    """A session on these nodes, which may be of keysieve's domain and of ONNX Runtime's own."""
    opsets = [helper.make_opsetid(*one) for one in (("", OPSET), (DOMAIN, 1), ("com.microsoft", 1))]
    graph = helper.make_graph(nodes, "test", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(find_library()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
