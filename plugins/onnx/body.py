"""A small writer of ONNX function bodies: `b.Add(x, 1)` adds a node and returns the name of its output."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 24


class Body:
    """Nodes of a function, or of one branch of an If. Python ints, floats and lists become constants.

    Integers become int64 and floats float32; give a numpy array for another dtype.
    """

    def __init__(self, prefix: str = ""):
        self.nodes: list[NodeProto] = []
        self._prefix = prefix
        self._constants: dict[Any, str] = {}

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def add(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            names = ["" if i is None else i if isinstance(i, str) else self.constant(i) for i in inputs]
            return self._add(op_type, names, outputs, attributes)

        return add

    def _add(self, op_type: str, inputs: Sequence[str], outputs: int, attributes: dict[str, Any]) -> Any:
        results = [f"{self._prefix}{op_type.lower()}_{len(self.nodes)}_{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, results, **attributes))
        return results[0] if outputs == 1 else results

    def constant(self, value: Any) -> str:
        """A constant, made once."""
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        signature = (array.dtype.str, array.shape, array.tobytes())
        if signature not in self._constants:
            name = self._add("Constant", [], 1, {"value": numpy_helper.from_array(array)})
            self._constants[signature] = name
        return self._constants[signature]

    def attribute(self, name: str) -> str:
        """The function's own integer attribute, as an int64 scalar."""
        result = f"{self._prefix}{name}_attribute"
        node = helper.make_node("Constant", [], [result])
        reference = onnx.AttributeProto(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
        node.attribute.append(reference)
        self.nodes.append(node)
        return result

    def size(self, value: str, axis: int) -> str:
        """The size of one axis, as int64 [1]."""
        return str(self.Shape(value, start=axis, end=axis + 1))

    def condition(self, condition: str, then: "Branch", otherwise: "Branch") -> str:
        """One value from either branch."""
        return str(self.If(condition, then_branch=then.graph(), else_branch=otherwise.graph()))

    def rename(self, old: str, new: str) -> None:
        """Give a value its final name (a function's output)."""
        for node in self.nodes:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]


class Branch(Body):
    """One branch of an If, with one result."""

    result: str
    dtype: int

    def give(self, result: str, dtype: int) -> "Branch":
        """Name the branch's result."""
        self.result, self.dtype = result, dtype
        return self

    def graph(self) -> GraphProto:
        output = helper.make_tensor_value_info(self.result, self.dtype, None)
        return helper.make_graph(self.nodes, self._prefix or "branch", [], [output])


FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
