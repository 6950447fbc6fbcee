"""The specification of the operations in plain torch; every faster carrier is compared with it."""

from keysieve.kernels.reference.attend import attend, attend_rows, visible
from keysieve.kernels.reference.grouped_matmul import grouped_matmul
from keysieve.kernels.reference.linear import linear, unpacked
from keysieve.kernels.reference.linear_attention import linear_attention
from keysieve.kernels.reference.score import score
from keysieve.kernels.reference.select import select
from keysieve.kernels.reference.update import update

__all__ = [
    "attend",
    "attend_rows",
    "grouped_matmul",
    "linear",
    "linear_attention",
    "score",
    "select",
    "unpacked",
    "update",
    "visible",
]
