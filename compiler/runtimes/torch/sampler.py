"""Drawing tokens on the device, as keysieve.compiler.sampling draws them on the host.

A draw is a list of launches, so that a decoding step can be captured in a CUDA graph with it. The random numbers are
those that the host would use, so that a seed gives the same tokens on every runtime, as far as logits agree.
"""

import numpy as np
import torch
from torch import Tensor

from keysieve.compiler.sampling import Sampling

AHEAD = 4096  # random numbers of a sequence that lie on the device at once


class DeviceSampler:
    """Draws a token for each of `batch` sequences; every sequence has its own random stream. `start` comes first."""

    def __init__(self, sampling: Sampling, batch: int, device: torch.device):
        self.sampling = sampling
        self.random = sampling.temperature > 0
        self._numbers = torch.empty(batch, AHEAD if self.random else 0, dtype=torch.float64, device=device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=device)

    def start(self, seed: int | None) -> None:
        """Start the random streams."""
        self._streams = [np.random.default_rng(seed) for _ in range(len(self._numbers))]
        self._drawn.zero_()
        self._left = 0

    def refill(self) -> None:
        """Before a draw: see that there are random numbers for it."""
        if self.random:
            if not self._left:
                fresh = np.stack([stream.random(AHEAD) for stream in self._streams])
                self._numbers.copy_(torch.from_numpy(fresh))
                self._left = AHEAD
            self._left -= 1

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B,V] -> tokens [B] int64."""
        if not self.random:
            return logits.argmax(-1)
        number = self._numbers.gather(1, (self._drawn % AHEAD).expand(len(logits), 1))
        self._drawn += 1
        options, vocabulary = self.sampling, logits.shape[1]
        scaled = logits.double() / options.temperature
        if options.top_p == 1 and not 0 < options.top_k < vocabulary:
            return _inverse(scaled.softmax(-1), number)
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        if 0 < options.top_k < vocabulary:
            scaled, order = scaled[:, : options.top_k], order[:, : options.top_k]
        chances = scaled.softmax(-1)
        before = torch.nn.functional.pad(chances.cumsum(-1)[:, :-1], (1, 0))
        # The likeliest tokens whose mass reaches top_p: the last of them is the first to reach it.
        chances = chances.where(before < options.top_p, 0.0)
        return order.gather(1, _inverse(chances, number)[:, None])[:, 0]


def _inverse(chances: Tensor, number: Tensor) -> Tensor:
    """The index [B] at which the cumulated chances [B,V], which need not add up to 1, pass the number [B,1]."""
    reached = chances.cumsum(-1)
    places = torch.searchsorted(reached, number * reached[:, -1:], right=True)[:, 0]
    return places.clamp(max=chances.shape[1] - 1)
