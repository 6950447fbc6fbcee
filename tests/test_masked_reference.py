"""The slow reference itself: against the plain model, a really shrunk cache, and the official scores."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from support.explicit_scores import explicit_scores, select_rows
from support.layer_rope import LayerRope, layer_ropes
from support.masked_forward import forward
from support.masked_reference import DECAY, MaskedReference, calibrate_by_hooks
from support.tiny_models import DECODERS, NEGATIVES, VOCABULARY, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data"
SCOPES = ("per_layer_per_head", "per_head", "union")
SMALL = EvictionConfig(PolicyConfig("triattention"), budget=32, interval=16, sinks=2, recent=8)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def statistics(model: PreTrainedModel) -> list[tuple[np.ndarray, np.ndarray]]:
    return calibrate_by_hooks(model, [tokens(200, seed=100), tokens(150, seed=101)])


# -- tiny models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS + NEGATIVES)
def test_tiny_models_are_reproducible_and_not_dull(name: str) -> None:
    ids = torch.tensor([tokens(60)])
    logits = tiny_model(name)(input_ids=ids).logits[0]
    assert torch.equal(logits, tiny_model(name)(input_ids=ids).logits[0])
    assert logits.std(-1).mean() > 0.8
    assert logits.dtype == torch.float32


def test_a_saved_tiny_model_loads_as_a_folder(tmp_path: Path) -> None:
    folder = save_tiny("smollm3", tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "Rows that matter least, naïvely: 漢字"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    ids = tokens(20)
    torch.testing.assert_close(plain_logits(model, ids), plain_logits(tiny_model("smollm3"), ids))


# -- the forward pass and what is recorded -------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_without_eviction_the_logits_are_the_plain_models(name: str) -> None:
    model = tiny_model(name)
    ids = tokens(120)
    reference = MaskedReference(model, statistics(model), EvictionConfig(PolicyConfig("triattention"), budget=200))
    got = reference.prefill([ids[:90]], chunk=32) + reference.feed([ids[90:95]]) + reference.decode([ids[95:]])
    torch.testing.assert_close(torch.cat(got), plain_logits(model, ids), atol=3e-5, rtol=0)
    assert (reference.rounds, reference.rows_evicted, reference.rows_held) == ([0], [0], [120])


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "gpt_neox"])  # whose q, k, v are one projection
def test_unrotated_queries_and_keys_are_what_the_projections_gave(name: str) -> None:
    model = tiny_model(name)
    ids = tokens(50)
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "k_proj", "q_norm", "k_norm")):  # the norm, called last, overwrites
            layer, kind = path.split(".")[2], path.rsplit(".")[-1][0]

            def keep(_module: object, _inputs: object, output: torch.Tensor, key: str = kind + layer) -> None:
                seen[key] = output.reshape(len(ids), -1)

            module.register_forward_hook(keep)
    _, layers = forward(model, ids, lambda layer, count: np.tri(count, dtype=bool)[None].repeat(4, 0))
    for layer, rope in enumerate(layer_ropes(model)):
        for kind, rotated in zip("qk", layers[layer], strict=True):
            got = rope.undo(rotated, np.arange(len(ids))).transpose(1, 0, 2).reshape(len(ids), -1)
            np.testing.assert_allclose(got, seen[f"{kind}{layer}"].numpy(), atol=2e-5)


def test_partial_rotary_leaves_the_other_dims_alone() -> None:
    model = tiny_model("gpt_neox")
    ids = tokens(50)
    seen: list[torch.Tensor] = []
    for block in model.gpt_neox.layers:
        block.attention.query_key_value.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    for (mean, size), fused in zip(calibrate_by_hooks(model, [ids]), seen, strict=True):
        query = fused.view(50, 4, 48)[..., :16].double().numpy()  # [N,Hq,D]
        np.testing.assert_allclose(mean, query.mean(0), atol=1e-5)
        pairs = np.hypot(query[..., :4], query[..., 4:8])
        np.testing.assert_allclose(size, pairs.mean(0), atol=1e-5)


def test_statistics_do_not_hold_the_attention_scaling() -> None:
    model = tiny_model("llama_yarn")
    ids = tokens(80)
    seen: list[torch.Tensor] = []
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    mean, size = calibrate_by_hooks(model, [ids])[0]
    query = seen[0].view(80, 4, 16).double().numpy()
    np.testing.assert_allclose(mean, query.mean(0), atol=1e-5)
    np.testing.assert_allclose(size, np.hypot(query[..., :8], query[..., 8:]).mean(0), atol=1e-5)


# -- scores and selection against the official code ----------------------------------------------------------


def _golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def _golden_rope(case: dict[str, np.ndarray], interleaved: bool = False) -> LayerRope:
    count = len(case["inv_freq"])
    first = 2 * np.arange(count) if interleaved else np.arange(count)
    second = first + 1 if interleaved else first + count

    def turns(length: int) -> np.ndarray:
        return np.exp(1j * np.arange(length)[:, None] * case["inv_freq"].astype(float))

    return LayerRope(first, second, case["inv_freq"].astype(float), 1.0, 2 * count, turns)


def _golden_scores(case: dict[str, np.ndarray], rotated: np.ndarray, now: int) -> np.ndarray:
    """Scores [L,Hq,N] of rotated keys [L,Hkv,N,D]: un-rotated from made-up positions, which cancel."""
    rope = _golden_rope(case)
    policy = PolicyConfig("triattention", offset_max=int(case["offsets"].max()))
    layers, heads, _ = case["q_mean_real"].shape
    group = heads // rotated.shape[1]
    positions = np.arange(rotated.shape[2])
    scores = np.zeros((layers, heads, rotated.shape[2]))
    for layer in range(layers):
        for head in range(heads):
            centre = np.concatenate([case["q_mean_real"][layer, head], case["q_mean_imag"][layer, head]])
            key = rope.undo(rotated[layer, head // group], positions)
            size = case["q_abs_mean"][layer, head].astype(float)
            scores[layer, head] = explicit_scores(key, positions, now, centre.astype(float), size, rope, policy)
    return scores


def _assert_kept(plan: list[list[list[int]]], wanted: np.ndarray) -> None:
    """wanted [L,Hkv,B], or any shape that broadcasts to it; its rows may be in any order."""
    kept = np.array(plan)
    assert (kept == np.sort(np.broadcast_to(wanted, kept.shape), -1)).all()


@pytest.mark.parametrize(
    "name",
    ["case1_mha_d64_union_default", "case2_gqa4_d128_perhead_qwen3", "case3_gqa3_d64_perlayerhead_llama3"],
)
def test_scores_and_kept_rows_are_the_official_ones(name: str) -> None:
    case = _golden(name)
    scope = json.loads(str(case["meta"]))["mode"]
    start = int(case["prefix_length"])
    scores = _golden_scores(case, case["k_rot"], int(case["round_start"]))
    np.testing.assert_allclose(scores[..., start:], case["scores_f64"], atol=1e-4)
    np.testing.assert_allclose(scores[..., start:], case["scores"], atol=1e-2)
    plan, _ = select_rows(scores, int(case["budget"]), start, 0, scope, case["k_rot"].shape[1])
    _assert_kept(plan, case["keep_indices"])


def test_a_second_round_is_the_official_one() -> None:
    case = _golden("case2_gqa4_d128_perhead_qwen3")
    start = int(case["prefix_length"])
    scores = _golden_scores(case, case["r2_k_rot"], int(case["r2_round_start"]))
    np.testing.assert_allclose(scores[..., start:], case["r2_scores"], atol=1e-2)
    plan, _ = select_rows(scores, int(case["budget"]), start, 0, "per_head", 2)
    _assert_kept(plan, case["r2_keep_indices"])


@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("trig", [True, False])
def test_interleaved_scores_are_the_official_ones(aggregation: str, trig: bool) -> None:
    case = _golden("case6_interleaved_functions")
    policy = PolicyConfig("triattention", aggregation=aggregation, trig=trig, offset_max=int(case["offsets"].max()))
    centre = np.stack([case["q_mean_real"], case["q_mean_imag"]], 1).reshape(-1).astype(float)
    rope = _golden_rope(case, interleaved=True)
    key = rope.undo(case["k_rot"], case["positions"])
    now, size = int(case["round_start"]), case["q_abs_mean"].astype(float)
    scores = explicit_scores(key, case["positions"], now, centre, size, rope, policy)
    np.testing.assert_allclose(scores, case[f"scores_{aggregation}_disabletrig{int(not trig)}"], atol=1e-2)


@pytest.mark.parametrize("name", ["llama_yarn", "gpt_neox", "cohere"])
def test_the_explicit_sum_is_the_closed_form_on_rotated_keys(name: str) -> None:
    model = tiny_model(name)
    ids, now, rope = tokens(80), 1000, layer_ropes(model)[0]
    centre, size = (part[0] for part in statistics(model)[0])  # head 0
    _, layers = forward(model, ids, lambda layer, count: np.tri(count, dtype=bool)[None].repeat(4, 0))
    rotated = layers[0][1][0].astype(float)  # [N,D], with the attention scaling s
    policy = PolicyConfig("triattention")
    turn = np.mean([np.exp(1j * rope.frequency * (now + offset)) for offset in policy.offsets], 0)
    wanted = rope.scaling * (rope.bands(rotated).conj() * rope.bands(centre) * turn).real.sum(1)
    wanted += rope.scaling * np.abs(rope.bands(rotated)) @ (size - np.abs(rope.bands(centre)))
    wanted += rotated[:, rope.plain] @ centre[rope.plain]
    positions = np.arange(len(ids))
    got = explicit_scores(rope.undo(rotated, positions), positions, now, centre, size, rope, policy)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_selection_breaks_ties_low_and_ranks_what_is_not_finite_last() -> None:
    scores = np.zeros((1, 1, 10))
    assert select_rows(scores, 5, 1, 2, "union", 1)[0] == [[[0, 1, 2, 8, 9]]]
    scores[0, 0, 1:4] = [math.nan, math.inf, -math.inf]
    assert select_rows(scores, 6, 1, 2, "union", 1)[0] == [[[0, 4, 5, 6, 8, 9]]]
    assert select_rows(scores, 2, 4, 2, "union", 1)[0] == [[[0, 1]]]  # protected rows alone exceed it


# -- eviction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["triattention", "streaming", "key-norm", "random"])
def test_counters_are_exact(policy: str) -> None:
    model = tiny_model("llama")
    eviction = replace(SMALL, policy=PolicyConfig(policy))
    reference = MaskedReference(model, statistics(model), eviction)
    reference.prefill([tokens(50)], chunk=16)  # 2 + 16 + 16 + 16: reaches 48 with the last chunk
    assert (reference.length, reference.rows_held, reference.rows_evicted) == ([50], [32], [18])
    reference.decode([tokens(15, seed=1)])
    assert (reference.rows_held, reference.rounds) == ([47], [1])
    reference.feed([tokens(1, seed=2)])
    assert (reference.length, reference.rows_held, reference.rounds) == ([48], [32], [2])
    reference.decode([tokens(24, seed=3)])
    assert (reference.rows_held, reference.rows_evicted, reference.rounds) == ([40], [50], [3])
    assert reference.length[0] + reference.rows_evicted[0] == 90
    for layer in range(3):
        for head in range(2):
            kept = reference.kept(layer, head)
            assert len(kept) == 40 and kept[:2] == [0, 1] and kept[-16:] == list(range(74, 90))


def test_streaming_keeps_sinks_and_the_latest() -> None:
    reference = MaskedReference(tiny_model("llama"), None, replace(SMALL, policy=PolicyConfig("streaming")))
    reference.prefill([tokens(48)], chunk=16)
    assert reference.kept(1, 1) == [0, 1, *range(18, 48)]


def test_a_pinned_prompt_stays() -> None:
    model = tiny_model("llama")
    eviction = replace(SMALL, prompt="pinned", policy=PolicyConfig("random"))
    reference = MaskedReference(model, None, eviction)
    reference.prefill([tokens(20), tokens(7)], chunk=16)
    reference.decode([tokens(70, seed=1), tokens(70, seed=2)])
    assert reference.rounds == [3, 2]
    assert reference.kept(0, 0, 0)[:20] == list(range(20))
    assert reference.kept(0, 0, 1)[:7] == list(range(7)) != reference.kept(0, 1, 1)[:8]


def _shrink(cache: DynamicCache, reference: MaskedReference, positions: list[list[list[int]]]) -> None:
    """Gather the rows of a HuggingFace cache that the reference keeps; updates their positions [L][Hkv]."""
    for layer, heads in enumerate(positions):
        gathered = []
        for head, before in enumerate(heads):
            kept = reference.kept(layer, head)
            gathered.append(torch.tensor([before.index(p) for p in kept]))
            heads[head] = kept
        rows = torch.stack(gathered)[None, :, :, None]
        part = cache.layers[layer]
        part.keys = part.keys.gather(2, rows.expand(-1, -1, -1, part.keys.shape[3]))
        part.values = part.values.gather(2, rows.expand(-1, -1, -1, part.values.shape[3]))


@pytest.mark.parametrize(
    ("name", "scope"),
    [("llama", scope) for scope in SCOPES]
    + [("llama_yarn", "per_head"), ("gpt_neox", "union"), ("cohere", "union")]
    + [("smollm3", "per_layer_per_head")],
)
def test_masking_equals_a_cache_that_is_really_shrunk(name: str, scope: str) -> None:
    model = tiny_model(name)
    reference = MaskedReference(model, statistics(model), replace(SMALL, scope=scope))
    model.set_attn_implementation("eager")
    cache = DynamicCache()
    positions: list[list[list[int]]] = [[[] for _ in range(heads)] for heads in reference.kv_heads]
    ids = tokens(114)
    done = 0
    largest = 0.0
    for size in [2, 16, 16, 16] + [1] * 40 + [24]:
        step = ids[done : done + size]
        got = reference.feed([step])[0]
        past = len(positions[0][0])
        mask = torch.full((size, past + size), -1e9).triu(past + 1)[None, None]
        with torch.no_grad():
            wanted = model(
                input_ids=torch.tensor([step]),
                position_ids=torch.arange(done, done + size)[None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
        largest = max(largest, float((got - wanted).abs().max()))
        for heads in positions:
            for head in heads:
                head += range(done, done + size)
        done += size
        if reference.rows_held[0] < len(positions[0][0]):
            _shrink(cache, reference, positions)
    assert reference.rounds == [4]
    assert largest < 1e-4
    assert (got - plain_logits(model, ids)[-size:]).abs().max() > 0.05  # eviction matters
    kept = [[tuple(head) for head in heads] for heads in positions]
    different = {head for heads in kept for head in heads}
    assert (len(different) == 1) == (scope == "union")
    assert (kept[0] == kept[1]) == (scope != "per_layer_per_head")


class _RowsHeldForPosition(MaskedReference):
    """The peers' mistake: phases count from the number of rows held."""

    def now(self, sequence):  # type: ignore[no-untyped-def]
        return sequence.length


def test_a_wrong_origin_of_the_phase_would_be_noticed() -> None:
    model = tiny_model("llama")
    results = []
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    for kind in (MaskedReference, _RowsHeldForPosition):
        reference = kind(model, statistics(model), SMALL)
        reference.prefill([tokens(50)], chunk=16)
        first = [reference.kept(*which) for which in heads]
        logits = reference.decode([tokens(60, seed=1)])[0]
        results.append((first, [reference.kept(*which) for which in heads], logits))
    assert results[0][0] == results[1][0]  # nothing was evicted before the first round: no difference
    assert results[0][1] != results[1][1]
    assert (results[0][2] - results[1][2]).abs().max() > 1e-2


@pytest.mark.parametrize("centres", ["calibrated", "online"])
def test_a_batch_equals_its_sequences_alone(centres: str) -> None:
    model = tiny_model("qwen3")
    eviction = replace(SMALL, policy=PolicyConfig("triattention", centres=centres))
    prompts = [tokens(50), tokens(7, seed=1), tokens(33, seed=2)]
    more = [tokens(30, seed=seed) for seed in (3, 4, 5)]
    batch = MaskedReference(model, statistics(model), eviction)
    together = [torch.cat(x) for x in zip(batch.prefill(prompts, 16), batch.decode(more), strict=True)]
    assert batch.rounds == [2, 0, 1]
    for b in range(3):
        solo = MaskedReference(model, statistics(model), eviction)
        alone = torch.cat([solo.prefill([prompts[b]], 16)[0], solo.decode([more[b]])[0]])
        assert torch.equal(alone, together[b])
        assert solo.kept(1, 0) == batch.kept(1, 0, b)


@pytest.mark.parametrize("policy", [PolicyConfig("triattention", centres="online"), PolicyConfig("random")])
def test_decode_equals_single_steps(policy: PolicyConfig) -> None:
    model = tiny_model("llama")
    ids, more = tokens(40), tokens(30, seed=1)
    results = []
    for single in (False, True):
        reference = MaskedReference(model, None, replace(SMALL, policy=policy))
        reference.prefill([ids], 16)
        steps = [reference.feed([[token]])[0] for token in more] if single else reference.decode([more])
        assert reference.rounds == [2]
        results.append((torch.cat(steps), reference.kept(2, 1), reference.kept(0, 0)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    assert results[0][1:] == results[1][1:]


@pytest.mark.parametrize("name", ["llama_yarn", "gpt_neox", "cohere", "smollm3"])
def test_online_centres_are_decayed_sums_of_the_queries(name: str) -> None:
    model = tiny_model(name)
    reference = MaskedReference(model, None, EvictionConfig(PolicyConfig("triattention", centres="online"), budget=500))
    ids = tokens(60)
    reference.prefill([ids[:50]], 16)
    reference.feed([ids[50:]])
    centres = reference.sequences[0].centres
    assert centres is not None
    weights = (1 - DECAY) * DECAY ** np.arange(59, -1, -1.0)
    _, layers = forward(model, ids, lambda layer, count: np.tri(count, dtype=bool)[None].repeat(4, 0))
    for rope, (centre, size), (rotated, _) in zip(layer_ropes(model), centres, layers, strict=True):
        query = rope.undo(rotated, np.arange(60))
        np.testing.assert_allclose(centre, np.einsum("n,hnd->hd", weights, query), atol=1e-5)
        sizes = np.abs(rope.bands(query))
        np.testing.assert_allclose(size, np.einsum("n,hnf->hf", weights, sizes), atol=1e-5)


def test_the_limit_of_a_step_can_be_lowered() -> None:
    model = tiny_model("llama")
    reference = MaskedReference(model, statistics(model), SMALL)
    reference.prefill([tokens(100), tokens(20, seed=1)], chunk=16, limit=33)
    assert (reference.rows_held, reference.rounds, reference.rows_evicted) == ([32, 20], [5, 0], [68, 0])
    assert len(reference.margins[0]) == 5 and min(reference.margins[0]) > 0
