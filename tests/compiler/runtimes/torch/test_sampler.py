"""Drawing on the device: what the host draws from the same logits, with the same seed."""

import numpy as np
import pytest
import torch

from keysieve.compiler.runtimes.torch import sampler as module
from keysieve.compiler.runtimes.torch.sampler import DeviceSampler
from keysieve.compiler.sampling import Sampler, Sampling

CPU = torch.device("cpu")
BATCH, VOCABULARY, DRAWS = 3, 700, 200


def draws(sampling: Sampling, logits: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
    """By the device and by the host: one list a step."""
    device, host = DeviceSampler(sampling, BATCH, CPU), Sampler(sampling, BATCH)
    device.start(sampling.seed)
    found = []
    for step in logits:
        device.refill()
        found.append(device(torch.from_numpy(step)).tolist())
    return found, [host(step) for step in logits]


def random_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(DRAWS, BATCH, VOCABULARY)).astype(np.float32) * 3


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, seed=1),
        Sampling(1.0, top_p=0.9, seed=2),
        Sampling(1.3, top_p=0.2, seed=3),
        Sampling(1.0, top_k=5, seed=4),
        Sampling(0.7, top_p=0.8, top_k=40, seed=5),
        Sampling(1.0, top_k=VOCABULARY, seed=6),
        Sampling(1.0, top_p=1e-9, seed=7),
    ],
    ids=str,
)
def test_the_draws_of_the_host(sampling: Sampling) -> None:
    found, wanted = draws(sampling, random_logits())
    assert found == wanted


def test_equal_chances_keep_the_order_of_their_tokens() -> None:
    logits = np.zeros((DRAWS, BATCH, VOCABULARY), np.float32)
    logits[:, :, 300:] = 1.0
    for sampling in (Sampling(1.0, top_p=0.5, seed=1), Sampling(), Sampling(1.0, top_k=400, seed=2)):
        found, wanted = draws(sampling, logits)
        assert found == wanted


def test_random_numbers_go_on_where_a_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", 7)
    found, wanted = draws(Sampling(1.0, seed=9), random_logits(1))
    assert found == wanted


def test_a_new_start_is_a_new_stream() -> None:
    sampler = DeviceSampler(Sampling(1.0), BATCH, CPU)
    logits = torch.from_numpy(random_logits()[0])

    def drawn(seed: int) -> list[int]:
        sampler.start(seed)
        sampler.refill()
        return sampler(logits).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
