"""The next token: greedy exactly, and sampling against the distribution computed by hand."""

import numpy as np
import pytest

from keysieve.compiler.sampling import Sampler, Sampling, _likeliest
from keysieve.errors import ConfigError

DRAWS = 4_000
LOGITS = np.log(np.array([0.02, 0.4, 0.05, 0.3, 0.13, 0.1], np.float32))  # most likely: 1, 3, 4, 5, 2, 0


def shares(sampling: Sampling, logits: np.ndarray = LOGITS) -> np.ndarray:
    """How often each token is drawn in DRAWS draws."""
    sampler = Sampler(sampling, 1)
    drawn = [sampler(logits[None])[0] for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


def assert_follows(found: np.ndarray, chances: np.ndarray) -> None:
    """Every share lies within 5 standard errors of its chance, and what has no chance is never drawn."""
    assert (found[chances == 0] == 0).all()
    assert (np.abs(found - chances) < 5 * np.sqrt(chances * (1 - chances) / DRAWS) + 1e-12).all(), (found, chances)


def of(*chances: float) -> np.ndarray:
    return np.array(chances) / sum(chances)


def test_temperature_zero_is_the_first_highest_logit() -> None:
    logits = np.array([[1.0, 5.0, 5.0], [7.0, -1.0, 0.0]])
    sampler = Sampler(Sampling(temperature=0, top_p=0.1, top_k=2, seed=3), 2)
    assert [sampler(logits) for _ in range(5)] == [[1, 0]] * 5


def test_shares_follow_the_softmax() -> None:
    assert_follows(shares(Sampling(temperature=1.0, seed=1)), of(0.02, 0.4, 0.05, 0.3, 0.13, 0.1))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    chances = np.exp(LOGITS.astype(float)) ** (1 / temperature)
    assert_follows(shares(Sampling(temperature=temperature, seed=2)), chances / chances.sum())


@pytest.mark.parametrize(
    ("top_k", "chances"),
    [(1, of(0, 1, 0, 0, 0, 0)), (3, of(0, 0.4, 0, 0.3, 0.13, 0)), (6, np.exp(LOGITS)), (99, np.exp(LOGITS))],
)
def test_top_k_keeps_the_k_most_likely(top_k: int, chances: np.ndarray) -> None:
    assert_follows(shares(Sampling(temperature=1.0, top_k=top_k, seed=3)), chances)


@pytest.mark.parametrize(
    ("top_p", "chances"),
    [
        (1e-9, of(0, 1, 0, 0, 0, 0)),
        (0.39, of(0, 1, 0, 0, 0, 0)),
        (0.41, of(0, 0.4, 0, 0.3, 0, 0)),  # 0.4 alone does not reach it
        (0.69, of(0, 0.4, 0, 0.3, 0, 0)),
        (0.75, of(0, 0.4, 0, 0.3, 0.13, 0)),
        (0.97, of(0, 0.4, 0.05, 0.3, 0.13, 0.1)),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, chances: np.ndarray) -> None:
    assert_follows(shares(Sampling(temperature=1.0, top_p=top_p, seed=4)), chances)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.99999])
def test_top_p_of_a_large_vocabulary(top_p: float) -> None:
    """More tokens than are sorted at first, and fewer: the set is that of a full sort."""
    chances = np.random.default_rng(0).dirichlet(np.full(20_000, 0.05))
    order = np.argsort(-chances)
    wanted = order[: int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1]
    found = _likeliest(chances, top_p)
    assert len(found) == len(wanted) and set(found) == set(wanted)


def test_top_p_measures_mass_within_top_k() -> None:
    # Of the three most likely, 0.4/0.83 + 0.3/0.83 = 0.843 reaches 0.8; of all, 0.7 would not.
    assert_follows(shares(Sampling(temperature=1.0, top_k=3, top_p=0.8, seed=5)), of(0, 0.4, 0, 0.3, 0, 0))


def test_top_p_sees_the_tempered_chances() -> None:
    # At temperature 0.25 the first token has 0.753 of the mass.
    found = shares(Sampling(temperature=0.25, top_p=0.7, seed=6))
    assert_follows(found, of(0, 1, 0, 0, 0, 0))


def test_the_seed_decides() -> None:
    logits = np.random.default_rng(0).normal(size=(1, 50))

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 1)
        return [sampler(logits)[0] for _ in range(40)]

    assert run(7) == run(7) != run(8)
    assert run(None) != run(None)


def test_a_batch_draws_what_solo_runs_draw() -> None:
    logits = np.random.default_rng(1).normal(size=(20, 3, 30))
    together = Sampler(Sampling(temperature=1.0, seed=9), 3)
    drawn = np.array([together(step) for step in logits])
    for b in range(3):
        alone = Sampler(Sampling(temperature=1.0, seed=9), 1)
        assert [alone(step[b : b + 1])[0] for step in logits] == drawn[:, b].tolist()


def test_large_logits_do_not_overflow() -> None:
    sampler = Sampler(Sampling(temperature=0.01, seed=0), 1)
    assert sampler(np.array([[-1e30, 1e4, 0.0]], np.float32)) == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be finite and at least 0; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature nan must be finite"),
        ({"temperature": float("inf")}, "temperature inf must be finite"),
        ({"top_p": 0.0}, r"top_p 0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p 1.1 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k -1 is negative; 0 keeps every token"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
