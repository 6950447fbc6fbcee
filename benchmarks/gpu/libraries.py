"""The plugin libraries that are driven, and the sizes of each: built on a machine that has the means, see pack.py."""

from dataclasses import dataclass

from gpu.sizes import QWEN3_8B, Shape
from keysieve.kernels.triton.configuration import KernelConfiguration


@dataclass(frozen=True)
class Case:
    """What the kernels are specialised for, and the batch and rows of the check."""

    kernels: KernelConfiguration
    batch: int
    rows: int
    budget: int

    @property
    def shape(self) -> Shape:
        of = self.kernels
        sizes = of.layers, of.query_heads, of.kv_heads, of.head_dim, of.dtype
        return Shape(*sizes, self.rows, self.budget, of.sinks, of.recent)


def kernels_of(shape: Shape, **more: object) -> KernelConfiguration:
    """The kernels of a model whose whole heads are rotated."""
    return KernelConfiguration(
        shape.layers,
        shape.query_heads,
        shape.kv_heads,
        shape.head_dim,
        shape.head_dim,
        shape.head_dim,
        shape.dtype,
        **more,  # type: ignore[arg-type]
    )


CASES = {
    "small": Case(KernelConfiguration(3, 6, 2, 64, 64, 64, "float16", sinks=2, recent=8), 3, 300, 200),
    "qwen3-8b": Case(kernels_of(QWEN3_8B), 2, QWEN3_8B.rows, QWEN3_8B.budget),
    "interleaved": Case(
        KernelConfiguration(
            2, 4, 2, 80, 96, 32, "bfloat16", interleaved=True, offsets=3, scope="per_head", sinks=2, recent=8
        ),
        2,
        700,
        500,
    ),
    "union": Case(KernelConfiguration(2, 8, 2, 128, 128, 64, "float32", scope="union"), 2, 2176, 2048),
}
# Which code a library brings: machine code for the GPU, or PTX alone, which its driver compiles.
CODE = {"cubin": (80, 90), "ptx": (80,)}
