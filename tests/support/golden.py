"""The golden cases, and the centres and weights of the method, computed the slow and plain way in float64."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent.parent / "data"
CASES = (
    "case1_mha_d64_union_default",
    "case2_gqa4_d128_perhead_qwen3",
    "case3_gqa3_d64_perlayerhead_llama3",
)
Arrays = dict[str, np.ndarray]


def load_case(name: str) -> Arrays:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def pair_indices(rotary_dim: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    band = np.arange(rotary_dim // 2)
    return (2 * band, 2 * band + 1) if interleaved else (band, band + rotary_dim // 2)


def complex_bands(x: np.ndarray, rotary_dim: int, interleaved: bool) -> np.ndarray:
    """The rotary pairs of x [..., D] as complex numbers [..., R/2]."""
    real, imaginary = pair_indices(rotary_dim, interleaved)
    return x[..., real].astype(np.float64) + 1j * x[..., imaginary]


def rotate(x: np.ndarray, angle: np.ndarray, interleaved: bool, scaling: float = 1.0) -> np.ndarray:
    """x [..., D] with its first 2 * R/2 dims turned by angle [..., R/2] and scaled; the rest as it is."""
    real, imaginary = pair_indices(2 * angle.shape[-1], interleaved)
    turned = scaling * complex_bands(x, 2 * angle.shape[-1], interleaved) * np.exp(1j * angle)
    out = np.broadcast_to(x, (*turned.shape[:-1], x.shape[-1])).astype(np.float64)
    out[..., real], out[..., imaginary] = turned.real, turned.imag
    return out


def turned_centre(
    q_mean: np.ndarray,
    inv_freq: np.ndarray,
    offsets: np.ndarray,
    position: int,
    aggregation: str = "mean",
    interleaved: bool = False,
    scaling: float = 1.0,
) -> np.ndarray:
    """W_T: q_mean [L, Hq, D] -> [L, 1, Hq, J, D] float64: c_f = E[q_f] exp(i w_f T) m_f, times the scaling s.

    "mean": J = 1 and m_f = mean over the offsets of exp(i w_f delta); "max": one exp(i w_f delta) per offset.
    """
    inv_freq = inv_freq.astype(np.float64)
    turn = np.exp(1j * np.outer(offsets.astype(np.float64), inv_freq))  # [J, R/2]
    if aggregation == "mean":
        turn = turn.mean(axis=0, keepdims=True)
    rotary_dim = 2 * len(inv_freq)
    bands = complex_bands(q_mean, rotary_dim, interleaved)[:, :, None] * np.exp(1j * inv_freq * position) * turn
    centre = np.repeat(q_mean[:, :, None].astype(np.float64), len(turn), axis=2)
    real, imaginary = pair_indices(rotary_dim, interleaved)
    centre[..., real], centre[..., imaginary] = scaling * bands.real, scaling * bands.imag
    return centre[:, None]


def case_queries(case: Arrays, interleaved: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(q_mean [L, Hq, D], q_abs [L, Hq, R/2]) of a golden case, in float64."""
    real_part, imaginary_part = case["q_mean_real"], case["q_mean_imag"]
    rotary_dim = 2 * real_part.shape[-1]
    q_mean = np.zeros((*real_part.shape[:-1], rotary_dim))
    real, imaginary = pair_indices(rotary_dim, interleaved)
    q_mean[..., real], q_mean[..., imaginary] = real_part, imaginary_part
    return q_mean, case["q_abs_mean"].astype(np.float64)


def score_inputs(case: Arrays, position: int, k_rot: np.ndarray, dtype: torch.dtype) -> dict:
    """The arguments of `score` for one round of a golden case, as a batch of one that is due."""
    q_mean, q_abs = case_queries(case)
    magnitude = np.abs(complex_bands(q_mean, q_mean.shape[-1], interleaved=False))
    rows = k_rot.shape[2]
    return {
        "length": ints(rows),
        "limit": ints(rows),
        "position": torch.tensor([position]),
        "centre": torch.from_numpy(turned_centre(q_mean, case["inv_freq"], case["offsets"], position)).to(dtype),
        "weight": torch.from_numpy(q_abs - magnitude)[:, None].to(dtype),
        "keys": [torch.from_numpy(layer)[None].to(dtype) for layer in k_rot],
        "policy": "trig",
        "query_heads": q_mean.shape[1],
        "rotary_dim": q_mean.shape[-1],
        "interleaved": 0,
    }


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
