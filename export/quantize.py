"""quantize: the weights of matrix products as 8 or 4 bit integers, in blocks that share a scale.

    x, W [N,K] -> Transpose -> MatMul
becomes
    x, W as integers [N,K], a scale and a zero for every 32 of a row -> MatMulNBits

The numbers are those of ONNX Runtime's own quantiser, and MatMulNBits is its operator, so the file needs ONNX Runtime.
The product that makes the logits never has less than 8 bits, for its errors reach the tokens directly; nor has the
embedding, which becomes GatherBlockQuantized.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from keysieve.export.rewriting import take_over

BITS = {"int8": 8, "int4": 4}
DOMAIN = "com.microsoft"
BLOCK = 32  # elements that share a scale; MatMulNBits has fast kernels for it
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: products of integers, activations rounded to 8 bits


@dataclass(frozen=True)
class Quantized:
    """What quantize did: products with a constant matrix, those of them that are integers now, bytes of all integers.

    A matrix that is embedding and product too (tied) counts once. error: root mean square of the differences to the
    weights that they replace, relative to these.
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
    def shape(self) -> tuple[int, int]:
        """K and N."""
        first, second = (int(size) for size in self.tensor.shape)  # type: ignore[arg-type]
        return (second, first) if self.transposed else (first, second)

    @property
    def depth_first(self) -> np.ndarray:
        array = self.tensor.numpy()
        return np.ascontiguousarray(array.T if self.transposed else array)


def quantize(model: ir.Model, weights: str) -> Quantized:
    """Replace every product of float activations with a constant matrix; weights: "int8" or "int4".

    Products of the same activations (query, key and value; gate and up) become one, whose result is split.
    """
    integers = _Integers(model)
    last = _products_before(model.graph.outputs)
    products = 0
    alike: dict[Any, list[tuple[ir.Node, _Matrix]]] = {}
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        matrix = constant_matrix(node.inputs[1])
        products += matrix is not None
        if matrix is not None and matrix.tensor.dtype == ir.DataType.FLOAT:
            bits = 8 if node in last else BITS[weights]
            alike.setdefault((node.inputs[0], bits), []).append((node, matrix))
    for (_, bits), members in alike.items():
        _replace_products(model.graph, bits, members, integers.products([matrix for _, matrix in members], bits))
    for node in [node for node in model.graph if node.op_type == "Gather"]:
        matrix = constant_matrix(node.inputs[0])
        if matrix is not None and not matrix.transposed and _fits_gather(node, matrix.tensor):
            data, scale, zero = integers.table(matrix)
            attributes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
            lookup = ir.node("GatherBlockQuantized", [data, node.inputs[1], scale, zero], attributes, domain=DOMAIN)
            model.graph.insert_before(node, lookup)
            take_over(node.outputs[0], lookup.outputs[0])
    RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    done = sum(map(len, alike.values()))
    return Quantized(products, done, integers.bytes_before, integers.bytes_after, integers.error)


def integer_products(graph: ir.Graph) -> list[ir.Node]:
    """The products that quantize made."""
    return [node for node in graph if node.op_type == "MatMulNBits" and node.domain == DOMAIN]


class _Integers:
    """Makes the integer forms of matrices, each once, and counts what that costs."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._made: dict[Any, list[ir.Value]] = {}
        self.bytes_before = self.bytes_after = 0
        self._squares = self._errors = 0.0

    @property
    def error(self) -> float:
        return (self._errors / self._squares) ** 0.5 if self._squares else 0.0

    def products(self, matrices: Sequence[_Matrix], bits: int) -> list[ir.Value]:
        """Weights, scales and zeros of matrices [K,N] side by side, as MatMulNBits takes them."""
        names = [matrix.name for matrix in matrices]
        key = (*names, bits)
        if key not in self._made:
            floats = np.concatenate([matrix.depth_first for matrix in matrices], axis=1)
            packed, scales, zeros = self._quantize(floats, bits)
            self._squares += float(np.square(floats).sum(dtype=np.float64))
            difference = floats - _dequantized(packed, scales, zeros, bits)[: len(floats)]
            self._errors += float(np.square(difference).sum(dtype=np.float64))
            self._made[key] = self._initializers(f"{'+'.join(names)}_{bits}bits", packed, scales, zeros)
        return self._made[key]

    def table(self, matrix: _Matrix) -> list[ir.Value]:
        """Rows [N,K], scales and zeros [N,K/BLOCK] with 8 bits, as GatherBlockQuantized takes them.

        They are the very memory of the product with the same matrix, where a model has tied them.
        """
        if matrix.name not in self._made:
            parts = [value.const_value for value in self.products([replace(matrix, transposed=True)], 8)]
            arrays = [part.numpy().reshape(matrix.shape[0], -1) for part in parts]  # type: ignore[union-attr]
            self._made[matrix.name] = self._initializers(f"{matrix.name}_rows", *arrays)
        return self._made[matrix.name]

    def _quantize(self, floats: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with _root_logger_as_it_is():
            from onnxruntime.quantization.matmul_nbits_quantizer import (
                DefaultWeightOnlyQuantConfig,
                DefaultWeightOnlyQuantizer,
            )

        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
        parts = DefaultWeightOnlyQuantizer(config).qbits_block_quant(floats)
        self.bytes_before += floats.nbytes
        self.bytes_after += sum(part.nbytes for part in parts)
        return parts

    def _initializers(self, name: str, *arrays: np.ndarray) -> list[ir.Value]:
        values = []
        for kind, array in zip(("weight", "scale", "zero"), arrays, strict=True):
            tensor = ir.tensor(array, name=f"{name}_{kind}")
            shape, dtype = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
            value = ir.Value(name=tensor.name, shape=shape, type=dtype, const_value=tensor)
            self._model.graph.register_initializer(value)
            values.append(value)
        return values


@contextmanager
def _root_logger_as_it_is() -> Iterator[None]:
    """The quantizer's module makes every library's notes visible when it is imported; that is for the user to say."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def _replace_products(
    graph: ir.Graph, bits: int, members: Sequence[tuple[ir.Node, _Matrix]], integers: Sequence[ir.Value]
) -> None:
    sizes = [matrix.shape[1] for _, matrix in members]
    attributes = {
        "K": members[0][1].shape[0],
        "N": sum(sizes),
        "bits": bits,
        "block_size": BLOCK,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    x = members[0][0].inputs[0]  # a product that was replaced may make it
    product = ir.node("MatMulNBits", [x, *integers], attributes, domain=DOMAIN)
    new, results = [product], product.outputs
    if len(members) > 1:
        one, together = members[0][0].outputs[0], product.outputs[0]
        together.type = one.type
        if one.shape is not None:
            together.shape = ir.Shape([*one.shape[:-1], sum(sizes)])
        lengths = ir.node("Constant", [], {"value_ints": sizes})
        split = ir.node("Split", [product.outputs[0], lengths.outputs[0]], {"axis": -1}, num_outputs=len(sizes))
        new, results = [product, lengths, split], split.outputs
    graph.insert_before(members[0][0], new)
    for (node, _), result in zip(members, results, strict=True):
        take_over(node.outputs[0], result)


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
        if node.op_type == "MatMul" and constant_matrix(node.inputs[1]):
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


def constant_matrix(value: ir.Value | None) -> _Matrix | None:
    """The initializer behind an operand; None for anything else."""
    producer = value.producer() if value is not None else None
    transposed = producer is not None and producer.op_type == "Transpose"
    source = producer.inputs[0] if producer is not None and transposed else value
    tensor = source.const_value if source is not None and source.is_initializer() else None
    if source is None or tensor is None or len(tensor.shape) != 2:
        return None
    return _Matrix(source.name or "", tensor, transposed)
