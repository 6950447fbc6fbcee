"""Gates: what a key will be worth, from the hidden state that it is made of, by ridge regression in closed form.

    u_g(n) = w_g . h_n + b_g        the log of the attention probability that key n of KV head g will get at most

Source: KVzap, arXiv 2601.07891, whose labels are those of KVzip, arXiv 2505.23416.
"""

import numpy as np
import torch
from torch import Tensor

from keysieve.errors import StatisticsError

RIDGE = 1e-3  # of the mean variance of a hidden number
BLOCK = 64  # queries at once, so that their probabilities stay in the processor's cache
FLOOR = 1e-6  # probability below which labels do not differ


def retention_labels(
    query: Tensor, key: Tensor, keys: int, first: int, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """The labels of the first `keys` keys: log(1e-6 + the highest probability that a later query pays).

    query [Hq,S,D] and key [Hkv,S,D] as a causal attention sees them; scale, softcap and sinks [Hq] as in
    kernels.reference.attend. Queries from token `first` on count, and those of all query heads of the group.
    Returns [keys, Hkv] float32, from log(1e-6) to about 0.
    """
    kv_heads, tokens, _ = key.shape
    later = query.float().reshape(kv_heads, -1, *query.shape[1:])  # [Hkv,G,S,D]
    best = torch.zeros(kv_heads, keys)
    for head in range(kv_heads):
        for start in range(first, tokens, BLOCK):
            end = min(start + BLOCK, tokens)
            logits = later[head, :, start:end] @ (key[head, :end].float().T * scale)  # [G,block,end]
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            logits[..., start:].masked_fill_(hidden, -torch.inf)
            highest = logits.amax(-1, keepdim=True)
            weights = logits.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total += torch.exp(sinks.float().view(kv_heads, -1)[head, :, None, None] - highest)
            probabilities = weights[..., :keys].div_(total)
            best[head] = torch.maximum(best[head], probabilities.amax((0, 1)))
    return torch.log(FLOOR + best.T)


def regression_sums(hidden: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """What one context adds: hidden [N,d], labels [N,Hkv] -> sums in float64 that add up over contexts.

    count [1], x [d], xx [d,d], y [Hkv], xy [d,Hkv].
    """
    x, y = hidden.double(), labels.double()
    sums = {
        "count": torch.tensor([len(x)], dtype=torch.float64),
        "x": x.sum(0),
        "xx": x.T @ x,
        "y": y.sum(0),
        "xy": x.T @ y,
    }
    return {name: value.numpy() for name, value in sums.items()}


def solve(sums: dict[str, np.ndarray], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight [Hkv,d], bias [Hkv]) float32 that minimise sum (w x + b - y)^2 + count lambda |w|^2.

    lambda = 1e-3 of the mean variance of x. Raises StatisticsError, naming the layer, where no finite answer exists.
    """
    count = float(sums["count"][0])
    if not count:
        raise StatisticsError(f"layer {layer}: no context was added to its gate")
    x_mean, y_mean = sums["x"] / count, sums["y"] / count
    with np.errstate(invalid="ignore"):  # what is not finite shows below
        covariance = sums["xx"] / count - np.outer(x_mean, x_mean)
        together = sums["xy"] / count - np.outer(x_mean, y_mean)
    ridge = RIDGE * max(float(covariance.diagonal().mean()), float(np.finfo(np.float32).tiny))
    covariance[np.diag_indices_from(covariance)] += ridge
    try:
        weight = np.linalg.solve(covariance, together).T
    except np.linalg.LinAlgError as error:
        raise StatisticsError(f"layer {layer}: its gate has no solution ({error}); give other texts") from error
    bias = y_mean - weight @ x_mean
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise StatisticsError(f"layer {layer}: its gate holds NaN or infinity; the model's hidden states do, too")
    return weight.astype(np.float32), bias.astype(np.float32)


def gate(hidden: Tensor, weight: np.ndarray, bias: np.ndarray) -> Tensor:
    """u [N,Hkv] float32 of hidden states [N,d]."""
    return hidden.float() @ torch.from_numpy(weight).T + torch.from_numpy(bias)


def fit_sums(predicted: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """What one context that was held out adds: predicted, labels [N,Hkv] -> moments [6,Hkv] in float64."""
    p, y = predicted.double(), labels.double()
    return {"fit": torch.stack([torch.ones_like(p), p, y, p * p, y * y, p * y]).sum(1).numpy()}


def correlation(sums: dict[str, np.ndarray]) -> np.ndarray:
    """Pearson's r of every KV head [Hkv] float32; 0 where either side is constant."""
    count, p, y, pp, yy, py = sums["fit"]
    p, y = p / count, y / count
    variances = np.clip(pp / count - p * p, 0, None) * np.clip(yy / count - y * y, 0, None)
    result = np.zeros(len(count))
    np.divide(py / count - p * y, np.sqrt(variances), out=result, where=variances > 1e-18)
    return result.clip(-1, 1).astype(np.float32)
