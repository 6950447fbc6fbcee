"""A product with integer weights, and activations rounded to integers, in plain torch."""

import torch
from torch import Tensor

BLOCK = 32


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    bits: int,
    gated: bool = False,
    epsilon: float = 0.0,
) -> Tensor:
    """x [...,K] times weights of 4 or 8 bits -> [...,N], float32.

    weight uint8 [N,B,4*bits], scale [N,B] and zero uint8 [N, (B*bits+7)//8], with B blocks of 32 along K, the last one
    filled up; the first of two in a byte has its low bits. gated: x [...,2K] is two halves, and silu(first) * second is
    multiplied. norm [K]: the RMS norm of x with these weights and epsilon is multiplied. residual [...,N] is added.
    Every block of x becomes integers up to 127 that share a scale; what is not finite makes the result
    so.
    """
    blocks = scale.shape[1]
    if norm is not None:
        x = torch.nn.functional.rms_norm(x, norm.shape, norm, epsilon)
    if gated:
        first, second = x.chunk(2, -1)
        x = torch.nn.functional.silu(first) * second
    x = torch.nn.functional.pad(x, (0, blocks * BLOCK - x.shape[-1])).unflatten(-1, (blocks, BLOCK))
    most = x.abs().amax(-1, keepdim=True)
    step = torch.where(most > 0, 127 / most, 0)
    whole = (x.double() * step).round().float()
    matrix = (unpacked(weight, bits) - unpacked(zero, bits)[:, :blocks, None]) * scale[..., None]
    y = (whole * (most / 127)).flatten(-2) @ matrix.flatten(1).T
    return y if residual is None else y + residual


def unpacked(values: Tensor, bits: int) -> Tensor:
    """Integers along the last axis, as float32."""
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    return values.float()
