"""quantize: the weights of matrix products as 8 or 4 bit integers, in blocks that share a scale.

    x, W [N,K] -> Transpose -> MatMul
becomes
    x, W as integers [N,K], a scale and a zero for every 32 of a row -> MatMulNBits

The numbers are those of ONNX Runtime's own quantiser, and MatMulNBits is its operator, so the file needs ONNX Runtime.
The product that makes the logits never has less than 8 bits, for its errors reach the tokens directly; nor has the
embedding, which becomes GatherBlockQuantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

BITS = {"int8": 8, "int4": 4}
DOMAIN = "com.microsoft"
BLOCK = 32  # elements that share a scale; MatMulNBits has fast kernels for it
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: products of integers, activations rounded to 8 bits


@dataclass(frozen=True)
class Quantized:
    """What quantize did: products with a constant matrix, those of them that are integers now, bytes of all integers.

    error: root mean square of the differences to the weights that they replace, relative to these.
    """

    products: int
    quantized: int
    bytes_before: int
    bytes_after: int
    error: float


@dataclass(frozen=True)
class _Matrix:
    """A constant matrix [K,N], and the name and place of its bytes: [N,K] where it is transposed."""

    name: str
    tensor: ir.TensorProtocol
    transposed: bool

    @property
    def depth_first(self) -> np.ndarray:
        array = self.tensor.numpy()
        return np.ascontiguousarray(array.T if self.transposed else array)


def quantize(model: ir.Model, weights: str) -> Quantized:
    """Replace every product of float activations with a constant matrix; weights: "int8" or "int4"."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    def quantizer(bits: int) -> DefaultWeightOnlyQuantizer:
        return DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits))

    made: dict[tuple[str, int], list[ir.Value]] = {}  # by name and bits: several products may use one matrix
    tables: dict[str, list[ir.Value]] = {}
    last = _products_before(model.graph.outputs)
    products = done = before = after = 0
    squares = errors = 0.0
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        matrix = _constant_matrix(node.inputs[1])
        if matrix is None:
            continue
        products += 1
        if matrix.tensor.dtype != ir.DataType.FLOAT:
            continue
        floats = matrix.depth_first
        depth, columns = floats.shape
        bits = 8 if node in last else BITS[weights]
        if (matrix.name, bits) not in made:
            packed, scales, zeros = parts = quantizer(bits).qbits_block_quant(floats)
            names = (f"{matrix.name}_{kind}{bits}" for kind in ("int", "scale", "zero"))
            made[matrix.name, bits] = [_initializer(model, *pair) for pair in zip(names, parts, strict=True)]
            before, after = before + floats.nbytes, after + sum(part.nbytes for part in parts)
            squares += float(np.square(floats).sum(dtype=np.float64))
            difference = floats - _dequantized(packed, scales, zeros, bits)[:depth]
            errors += float(np.square(difference).sum(dtype=np.float64))
        attributes = {"K": depth, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": INT8_ACTIVATIONS}
        inputs = [node.inputs[0], *made[matrix.name, bits]]
        _replace(model, node, ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name))
        done += 1
    for node in [node for node in model.graph if node.op_type == "Gather"]:
        matrix = _constant_matrix(node.inputs[0])
        if matrix is None or matrix.transposed or not _fits_gather(node, matrix.tensor):
            continue
        if matrix.name not in tables:
            floats = matrix.tensor.numpy()
            packed, scales, zeros = quantizer(8).qbits_block_quant(np.ascontiguousarray(floats.T))
            parts = packed.reshape(floats.shape), scales.reshape(len(floats), -1), zeros.reshape(len(floats), -1)
            names = (f"{matrix.name}_{kind}8_rows" for kind in ("int", "scale", "zero"))
            tables[matrix.name] = [_initializer(model, *pair) for pair in zip(names, parts, strict=True)]
            before, after = before + floats.nbytes, after + sum(part.nbytes for part in parts)
        data, scale, zero = tables[matrix.name]
        attributes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        inputs = [data, node.inputs[1], scale, zero]
        _replace(model, node, ir.node("GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=node.name))
    RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    return Quantized(products, done, before, after, (errors / squares) ** 0.5 if squares else 0.0)


def _fits_gather(node: ir.Node, table: ir.TensorProtocol) -> bool:
    """Whether it takes whole rows, of floats in whole blocks."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    width = table.shape[1]
    return axis == 0 and table.dtype == ir.DataType.FLOAT and isinstance(width, int) and width % BLOCK == 0


def _products_before(values: Sequence[ir.Value]) -> set[ir.Node]:
    """The products with a constant matrix that make the first of the values (the logits), with no other in between."""
    found, seen, waiting = set(), set(), [values[0]]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "MatMul" and _constant_matrix(node.inputs[1]):
            found.add(node)
        else:
            waiting += [value for value in node.inputs if value is not None]
    return found


def _dequantized(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """[K,N] of packed [N,K/BLOCK,BLOCK*bits/8]; the zeros of a row are packed alike."""
    columns, blocks = packed.shape[:2]
    zero = _unpacked(zeros, bits)[:, :blocks, None]
    values = (_unpacked(packed, bits) - zero) * scales.reshape(columns, blocks, 1)
    return values.reshape(columns, -1).T


def _unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis, as float32."""
    if bits == 4:
        values = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    return values.astype(np.float32)


def _constant_matrix(value: ir.Value | None) -> _Matrix | None:
    """The initializer behind an operand; None for anything else."""
    producer = value.producer() if value is not None else None
    transposed = producer is not None and producer.op_type == "Transpose"
    source = producer.inputs[0] if producer is not None and transposed else value
    tensor = source.const_value if source is not None and source.is_initializer() else None
    if source is None or tensor is None or len(tensor.shape) != 2:
        return None
    return _Matrix(source.name or "", tensor, transposed)


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    value, result = old.outputs[0], new.outputs[0]
    result.name, result.shape, result.type = value.name, value.shape, value.type
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], [value], [result])
