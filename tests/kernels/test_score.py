import numpy as np
import pytest
import torch

from keysieve.errors import ConfigError
from keysieve.kernels.reference import score
from support.golden import CASES, case_queries, complex_bands, ints, load_case, rotate, score_inputs, turned_centre


def scores_of(case, position, k_rot, dtype=torch.float32):
    """[L, Hq, N - prefix] numpy: as the official code, which does not score the prompt."""
    return score(**score_inputs(case, position, k_rot, dtype))[:, 0, :, int(case["prefix_length"]) :].numpy()


@pytest.mark.parametrize("name", CASES)
def test_golden_scores(name):
    case = load_case(name)
    position = int(case["round_start"])
    single = scores_of(case, position, case["k_rot"])
    assert single.dtype == np.float32
    assert np.abs(single - case["scores"]).max() < 1e-2
    double = scores_of(case, position, case["k_rot"], torch.float64)
    assert double.dtype == np.float64
    assert np.abs(double - case["scores_f64"]).max() < 1e-4


def test_second_round_phase_origin_is_the_absolute_position_not_the_rows_held():
    case = load_case("case2_gqa4_d128_perhead_qwen3")
    position, rows = int(case["r2_round_start"]), case["r2_k_rot"].shape[2]
    assert np.abs(scores_of(case, position, case["r2_k_rot"]) - case["r2_scores"]).max() < 1e-2
    assert np.abs(scores_of(case, rows, case["r2_k_rot"]) - case["r2_scores"]).max() > 1


def test_unrotated_keys_give_other_scores():
    case = load_case("case2_gqa4_d128_perhead_qwen3")
    angle = np.outer(case["positions"], case["inv_freq"].astype(np.float64))
    unrotated = rotate(case["k_rot"], -angle, interleaved=False).astype(np.float32)
    assert np.abs(scores_of(case, int(case["round_start"]), unrotated) - case["scores"]).max() > 1


@pytest.fixture(scope="module")
def interleaved_case():
    return load_case("case6_interleaved_functions")


def interleaved_scores(case, aggregation, trig, norm_weighting, interleaved=1, dtype=torch.float64):
    q_mean, q_abs = case_queries({**case, **{k: case[k][None, None] for k in case if k.startswith("q_")}}, True)
    position = int(case["round_start"])
    centre = turned_centre(q_mean, case["inv_freq"], case["offsets"], position, aggregation, interleaved=True)
    weight = q_abs - np.abs(complex_bands(q_mean, 64, True)) if norm_weighting else q_abs
    return score(
        length=ints(200),
        limit=ints(200),
        position=torch.tensor([position]),
        centre=torch.from_numpy(centre * trig).to(dtype),
        weight=torch.from_numpy(weight)[:, None].to(dtype),
        keys=[torch.from_numpy(case["k_rot"])[None, None].to(dtype)],
        policy="trig",
        query_heads=1,
        rotary_dim=64,
        interleaved=interleaved,
    )[0, 0, 0].numpy()


@pytest.mark.parametrize(
    ("aggregation", "trig", "norm_weighting", "expected"),
    [
        ("mean", True, True, "scores_mean_disabletrig0"),
        ("max", True, True, "scores_max_disabletrig0"),
        ("mean", False, True, "scores_mean_disabletrig1"),
        ("max", False, True, "scores_max_disabletrig1"),
        ("mean", True, False, "scores_mean_disablemlr"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_interleaved(interleaved_case, aggregation, trig, norm_weighting, expected, dtype):
    found = interleaved_scores(interleaved_case, aggregation, trig, norm_weighting, dtype=dtype)
    assert np.abs(found - interleaved_case[expected]).max() < 1e-2


def test_interleaved_pairing_is_not_half_split(interleaved_case):
    found = interleaved_scores(interleaved_case, "mean", False, True, interleaved=0)
    assert np.abs(found - interleaved_case["scores_mean_disabletrig1"]).max() > 1


def test_golden_magnitude_term_of_every_band(interleaved_case):
    """One query head per band, so that a band cannot take another's place."""
    case = interleaved_case
    weight = case["q_abs_mean"] - np.hypot(case["q_mean_real"], case["q_mean_imag"])
    found = score(
        length=ints(200),
        limit=ints(0),
        position=torch.tensor([200]),
        centre=torch.zeros(1, 1, 32, 1, 64),
        weight=torch.diag(torch.from_numpy(weight))[None, None],
        keys=[torch.from_numpy(case["k_rot"])[None, None]],
        policy="trig",
        query_heads=32,
        rotary_dim=64,
        interleaved=1,
    )
    np.testing.assert_allclose(found[0, 0].numpy().T, case["extra"], atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize(("rotary_dim", "scaling"), [(16, 1.0), (6, 1.0), (6, 1.3), (0, 1.0)])
def test_equals_the_sum_over_offsets_of_the_unrotated_query_and_key(interleaved, aggregation, rotary_dim, scaling):
    """The definition: the centre rotated to T + delta, times the key rotated to its own position."""
    rng = np.random.default_rng(5)
    layers, heads, kv_heads, dim, rows, position = 2, 6, 2, 16, 9, 41
    inv_freq = 10000.0 ** (-np.arange(rotary_dim // 2) / max(rotary_dim // 2, 1))
    offsets = np.array([1, 2, 4, 8])
    q_mean = rng.normal(size=(layers, heads, dim))
    weight = rng.random((layers, heads, rotary_dim // 2))
    k_pre = rng.normal(size=(layers, kv_heads, rows, dim))
    at = np.sort(rng.choice(position, rows, replace=False))
    k_rot = rotate(k_pre, np.outer(at, inv_freq), interleaved, scaling)

    expected = np.zeros((layers, heads, rows))
    for layer, head, n in np.ndindex(expected.shape):
        key = k_rot[layer, head // 3, n]
        magnitudes = np.abs(complex_bands(k_pre[layer, head // 3, n], rotary_dim, interleaved))
        future = [
            rotate(q_mean[layer, head], (position + delta) * inv_freq, interleaved, scaling) @ key for delta in offsets
        ]
        norm_term = scaling**2 * (weight[layer, head] * magnitudes).sum()
        expected[layer, head, n] = getattr(np, aggregation)(future) + norm_term

    found = score(
        length=ints(rows),
        limit=ints(rows),
        position=torch.tensor([position]),
        centre=torch.from_numpy(turned_centre(q_mean, inv_freq, offsets, position, aggregation, interleaved, scaling)),
        weight=torch.from_numpy(scaling * weight)[:, None],
        keys=list(torch.from_numpy(k_rot)[:, None]),
        policy="trig",
        query_heads=heads,
        rotary_dim=rotary_dim,
        interleaved=int(interleaved),
    )
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-10)


def random_batch(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "length": ints(4, 7, 5)[:batch],
        "limit": ints(7, 7, 7)[:batch],
        "position": torch.tensor([100, 4093 * 3 + 50, 0])[:batch],
        "centre": normal(2, batch, 4, 3, 8),
        "weight": normal(2, batch, 4, 3).abs(),
        "keys": tuple(normal(batch, 2, 10, 8) for _ in range(2)),
        "query_heads": 4,
        "rotary_dim": 6,
        "interleaved": 0,
    }


POLICIES = ("trig", "key_norm", "streaming", "random")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_sequence_of_a_batch_is_scored_by_its_own_inputs(policy):
    inputs = random_batch()
    whole = score(**inputs, policy=policy)
    assert whole.shape == (2, 3, 4, 10)
    for b in range(3):
        one = {**inputs, "limit": ints(0)}
        for name in ("length", "position"):
            one[name] = inputs[name][b : b + 1]
        for name in ("centre", "weight"):
            one[name] = inputs[name][:, b : b + 1]
        one["keys"] = [key[b : b + 1] for key in inputs["keys"]]
        torch.testing.assert_close(whole[:, b : b + 1], score(**one, policy=policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_sequence_due_gives_zeros(policy):
    inputs = {**random_batch(), "limit": ints(8, 8, 8)}
    found = score(**inputs, policy=policy)
    assert found.shape == (2, 3, 4, 10) and not found.any()


@pytest.mark.parametrize("policy", POLICIES)
def test_inputs_are_not_modified(policy):
    inputs = random_batch()
    before = [t.clone() for t in (inputs["centre"], inputs["weight"], *inputs["keys"])]
    score(**inputs, policy=policy)
    after = (inputs["centre"], inputs["weight"], *inputs["keys"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_scored_in_float32(dtype):
    inputs = random_batch()
    inputs["keys"] = tuple(key.to(dtype) for key in inputs["keys"])
    rounded = {**inputs, "keys": tuple(key.float() for key in inputs["keys"])}
    found = score(**inputs, policy="trig")
    assert found.dtype == torch.float32
    assert torch.equal(found, score(**rounded, policy="trig"))


def without_centres(inputs):
    return {**inputs, "centre": torch.zeros(1, 1, 1, 1, 1), "weight": torch.zeros(1, 1, 1, 1)}


def test_key_norm_is_minus_the_norm_over_all_dims():
    inputs = without_centres(random_batch())
    found = score(**inputs, policy="key_norm")
    for layer, key in enumerate(inputs["keys"]):
        expected = -torch.linalg.vector_norm(key, dim=-1)  # [B, Hkv, C]
        torch.testing.assert_close(found[layer], expected[:, [0, 0, 1, 1]])


def test_streaming_is_the_row_index():
    found = score(**without_centres(random_batch()), policy="streaming")
    assert torch.equal(found, torch.arange(10.0).expand(2, 3, 4, 10))


def test_random_is_the_hash_of_the_contract():
    inputs = without_centres(random_batch())
    found = score(**inputs, policy="random")
    for layer, b, head, row in np.ndindex(*found.shape):
        x = (int(inputs["position"][b]) % 4093 * 1009 + row * 1013 + head * 31 + layer * 17) % 65521
        for _ in range(2):
            x = (x * x + 12289) % 65521
        assert found[layer, b, head, row] == np.float32(x) / np.float32(65521)


def test_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match=r"h2o.*trig, key_norm, streaming, random"):
        score(**random_batch(), policy="h2o")


def test_centres_in_another_layout_are_refused():
    inputs = random_batch()
    inputs["centre"] = inputs["centre"].transpose(2, 3)
    with pytest.raises(ConfigError, match=r"\[2, 3, 3, 4, 8\].*L, B, Hq, J, D"):
        score(**inputs, policy="trig")
