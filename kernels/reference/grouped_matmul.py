"""Products of rows with the matrix of their expert, in plain torch."""

import torch
from torch import Tensor


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N,I] in the order of experts, weight [E,I,O], ends [E]: where the rows of each expert end -> [N,O].

    Reads `ends` on the host.
    """
    parts, start = [], 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        parts.append(rows[start:end] @ matrix)
        start = end
    return torch.cat(parts)
