"""The slow reference of a decoder that evicts: it keeps every token and masks what was evicted.

It shares no code with keysieve's passes and kernels. Every step runs the whole history through the model,
without a cache; which key a query may see is remembered as the time at which each key was evicted. Scores
come from un-rotated keys and the explicit sum over the future offsets (TriAttention, arXiv 2604.04921), in
float64; rows are chosen by plain loops.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from keysieve.compiler.config import EvictionConfig, PolicyConfig

ATTENTION_NAME = "masked_reference"
DECAY = 0.5 ** (1 / 128)  # of online centres, per token
NEVER = np.iinfo(np.int64).max
ANY = 64  # KV heads of a layer that is not known yet, at most
# Model type -> which dims of a rotated head form a pair; a model that is not listed is refused.
PAIRING = {
    "llama": "half_split",
    "qwen2": "half_split",
    "qwen3": "half_split",
    "gpt_neox": "half_split",
    "smollm3": "half_split",
    "cohere": "interleaved",
}

Statistics = Sequence[tuple[np.ndarray, np.ndarray]]
"""Per layer: q_mean [Hq,D] in the layout of pre-RoPE queries, q_abs [Hq,R/2] (ignored without RoPE)."""


# -- running the model ---------------------------------------------------------------------------------------


@dataclass
class _Recorder:
    """What one forward pass is told and what it leaves: visible(layer, N) -> [Hkv,N,N]; layer -> (q, k).

    Layers with a sliding window or chunks see those, whatever `visible` says, and leave nothing.
    """

    visible: Callable[[int, int], np.ndarray]
    layers: dict[int, tuple[np.ndarray, np.ndarray]]


_recorder: _Recorder | None = None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one sequence: query [1,Hq,N,D], key and value [1,Hkv,N,D] -> [1,N,Hq,D]."""
    if _recorder is None:
        raise RuntimeError("the masked_reference attention runs only inside forward()")
    layer, count = int(module.layer_idx), query.shape[2]  # type: ignore[arg-type]
    group = query.shape[1] // key.shape[1]
    window, chunk = layer_window(module.config, layer)
    if window or chunk:
        age = torch.arange(count)[:, None] - torch.arange(count)
        seen = (age >= 0) & (age < window) if window else (age >= 0) & (age <= torch.arange(count)[:, None] % chunk)
        visible = seen.expand(key.shape[1], -1, -1)
    else:
        _recorder.layers[layer] = (query[0].numpy(), key[0].numpy())
        visible = torch.from_numpy(_recorder.visible(layer, count))
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    heads = []
    for head in range(query.shape[1]):
        logits = query[0, head] @ key[0, head // group].T * scaling  # [N,N]
        if softcap:
            logits = (logits / softcap).tanh() * softcap
        logits = logits.masked_fill(~visible[head // group], -math.inf)
        if sinks is not None:  # a sink is a row whose value is zero
            logits = torch.cat([logits, sinks[head].expand(count, 1)], 1)
        heads.append(logits.softmax(-1)[:, :count] @ value[0, head // group])
    return torch.stack(heads, 1)[None], None


def layer_window(config: Any, layer: int) -> tuple[int, int]:
    """(window, chunk) in tokens of one layer, 0 for none, as the configuration says it."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "sliding_attention" if window else "full_attention"
    if kind == "chunked_attention":
        return 0, config.attention_chunk_size
    return window if kind == "sliding_attention" else 0, 0


AttentionInterface.register(ATTENTION_NAME, _attention)


@contextmanager
def _recording(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    global _recorder
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
        model.set_attn_implementation(before)


def forward(
    model: PreTrainedModel, tokens: Sequence[int], visible: Callable[[int, int], np.ndarray]
) -> tuple[torch.Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """Logits [N,V] of one whole sequence, and its rotated queries [Hq,N,D] and keys [Hkv,N,D] per full layer."""
    recorder = _Recorder(visible, {})
    with torch.no_grad(), _recording(model, recorder):
        positions = torch.arange(len(tokens))[None]
        logits = model(input_ids=torch.tensor([list(tokens)]), position_ids=positions, use_cache=False).logits[0]
    return logits, [recorder.layers[layer] for layer in sorted(recorder.layers)]


# -- rotary embedding, undone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRope:
    """The rotation of one layer: first and second dim of each band's pair [R/2], radians per position [R/2].

    turns(N) gives s * exp(i w p) as the model computes it, [N,R/2] complex for positions 0..N-1. A layer
    without rotation has no bands. The dims outside all pairs (`plain`) are not rotated. grows(positions [N]) is
    the factor of the queries at those positions.
    """

    first: np.ndarray
    second: np.ndarray
    frequency: np.ndarray
    scaling: float
    head_dim: int
    turns: Callable[[int], np.ndarray]
    grows: Callable[[np.ndarray], np.ndarray] = np.ones_like

    @property
    def plain(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.head_dim), np.concatenate([self.first, self.second]))

    def bands(self, x: np.ndarray) -> np.ndarray:
        """The rotated dims of x [...,D] as complex numbers [...,R/2]."""
        return x[..., self.first] + 1j * x[..., self.second]

    def undo(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pre-RoPE values (float64) of post-RoPE x [...,N,D] whose rows stand at positions [N]."""
        result = x.astype(np.float64)
        if len(self.first):
            z = self.bands(result) / self.turns(int(positions.max()) + 1)[positions]
            result[..., self.first], result[..., self.second] = z.real, z.imag
        return result


def layer_ropes(model: PreTrainedModel, pairing: str | None = None) -> list[LayerRope]:
    """The rotation of every layer with full attention, from the model's own rotary module.

    pairing: "half_split", "interleaved" (", last" where the last dims of a head are rotated) or "nope"; by default what
    PAIRING says of the model type.
    """
    config = model.config
    pairing, _, place = (pairing or PAIRING[config.model_type]).partition(", ")
    # Where kinds of layers have tables of their own, the full ones have this.
    names = ("inv_freq", "full_attention_inv_freq")
    rotary, name = next((m, name) for m in model.modules() for name in names if hasattr(m, name))
    kind = {} if name == "inv_freq" else {"layer_type": "full_attention"}
    inv_freq = getattr(rotary, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "qk_head_dim", head_dim)
    bands = np.arange(len(inv_freq))
    first = bands if pairing == "half_split" else 2 * bands
    second = bands + len(bands) if pairing == "half_split" else 2 * bands + 1
    start = head_dim - 2 * len(bands) if place == "last" else 0

    def turns(count: int) -> np.ndarray:
        table = rotary(torch.zeros(1), torch.arange(count)[None], **kind)
        if isinstance(table, torch.Tensor):  # of complex numbers
            return table[0].to(torch.complex128).numpy()
        cos, sin = table
        # A model's table has every band twice (one half after the other, or side by side), or once.
        column = second if pairing == "interleaved" and bool((cos[..., 0] == cos[..., 1]).all()) else bands
        return (cos[0, :, column].double() + 1j * sin[0, :, column].double()).numpy()

    def grows(positions: np.ndarray) -> np.ndarray:
        if not getattr(config, "attn_temperature_tuning", False):
            return np.ones(len(positions))
        return 1 + config.attn_scale * np.log1p((positions + 1) // config.floor_scale)

    none = np.array([], dtype=int)
    frequency = inv_freq.double().numpy()
    scaling = float(getattr(rotary, name.replace("inv_freq", "attention_scaling")))
    rotated = LayerRope(start + first, start + second, frequency, scaling, head_dim, turns)
    plain = LayerRope(none, none, np.zeros(0), 1.0, head_dim, turns, grows)
    uses = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers  # 1: the layer rotates
    return [rotated if uses[layer] and pairing != "nope" else plain for layer in full_layers(config)]


def full_layers(config: Any) -> list[int]:
    """The layers with attention that sees the whole past."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [n for n, kind in enumerate(kinds) if kind == "full_attention" and not any(layer_window(config, n))]


# -- scores and selection ------------------------------------------------------------------------------------


def explicit_scores(
    key: np.ndarray,
    positions: np.ndarray,
    now: int,
    centre: np.ndarray,
    magnitude: np.ndarray,
    rope: LayerRope,
    policy: PolicyConfig,
) -> np.ndarray:
    """TriAttention's score [N] of pre-RoPE keys [N,D] at absolute positions [N], for one query head.

    now: T, the absolute position of the next token; centre [D] = E[q], magnitude [R/2] = E|q_f|, pre-RoPE.
    Dims that are not rotated add <E[q], k>, which belongs to the trigonometric term.
    """
    q, k = rope.bands(centre), rope.bands(key)  # [R/2], [N,R/2]
    squared = rope.scaling**2
    plain = key[:, rope.plain] @ centre[rope.plain] if policy.trig else np.zeros(len(key))
    norm = np.zeros(len(key))
    if policy.norm and len(rope.first):
        norm = squared * (np.abs(k) @ (magnitude - np.abs(q)))
    per_offset = []
    for offset in policy.offsets:
        distance = (now - positions + offset).astype(np.float64)  # [N]
        trig = np.zeros(len(key))
        if policy.trig:
            phase = distance[:, None] * rope.frequency + np.angle(q) - np.angle(k)
            trig = squared * (np.abs(q) * np.abs(k) * np.cos(phase)).sum(1)
        per_offset.append(trig + norm + plain)
    return np.mean(per_offset, 0) if policy.aggregation == "mean" else np.max(per_offset, 0)


def random_score(position: int, row: int, head: int, layer: int) -> float:
    """The control policy's hash to [0,1)."""
    x = ((position % 4093) * 1009 + row * 1013 + head * 31 + layer * 17) % 65521
    for _ in range(2):
        x = (x * x + 12289) % 65521
    return x / 65521


def select_rows(
    scores: np.ndarray, keep: int, front: int, recent: int, scope: str, kv_heads: int
) -> tuple[list[list[list[int]]], float]:
    """Rows [L][Hkv][keep] (ascending) that stay, of scores [L,Hq,N], and the margin of the closest decision.

    Rows before `front` and the last `recent` are protected; a score that is not finite ranks last; ties go to
    the lowest row. The margin is the least difference between a chosen and a refused candidate, in z-scores.
    """
    layers, heads, length = scores.shape
    group = heads // kv_heads
    protected = [n for n in range(length) if n < front or n >= length - recent][:keep]
    candidates = [n for n in range(length) if front <= n < length - recent]

    z: dict[tuple[int, int, int], float] = {}
    for layer in range(layers):
        for head in range(heads):
            finite = [scores[layer, head, n] for n in candidates if math.isfinite(scores[layer, head, n])]
            mean = sum(finite) / max(len(finite), 1)
            std = math.sqrt(sum((s - mean) ** 2 for s in finite) / max(len(finite), 1))
            for n in candidates:
                s = scores[layer, head, n]
                z[layer, head, n] = (s - mean) / max(std, 1e-6) if math.isfinite(s) else -math.inf

    def best(layer: int, kv_head: int, n: int) -> float:
        return max(z[layer, head, n] for head in range(kv_head * group, (kv_head + 1) * group))

    def value(layer: int, kv_head: int, n: int) -> float:
        if scope == "per_layer_per_head":
            return best(layer, kv_head, n)
        if scope == "per_head":
            return sum(best(other, kv_head, n) for other in range(layers)) / layers
        if scope == "union":
            return max(best(other, g, n) for other in range(layers) for g in range(kv_heads))
        raise ValueError(f"unknown scope {scope!r}")

    margin = math.inf
    plan: list[list[list[int]]] = []
    for layer in range(layers):
        plan.append([])
        for kv_head in range(kv_heads):
            values = {n: value(layer, kv_head, n) for n in candidates}
            ranked = sorted(candidates, key=lambda n: (-values[n], n))
            chosen, refused = ranked[: keep - len(protected)], ranked[keep - len(protected) :]
            plan[-1].append(sorted(protected + chosen))
            if chosen and refused and math.isfinite(values[refused[0]]):
                margin = min(margin, values[chosen[-1]] - values[refused[0]])
    return plan, margin


# -- the reference -------------------------------------------------------------------------------------------


class _Sequence:
    """One sequence: all its tokens, when each key was evicted, and the positions that the rows hold."""

    def __init__(self, kv_heads: list[int], statistics: Statistics | None, pinned: int):
        self.tokens: list[int] = []
        self.pinned = pinned
        self.evicted_at = [np.full((heads, 0), NEVER) for heads in kv_heads]  # by layer
        self.rows: list[list[list[int]]] = [[[] for _ in range(heads)] for heads in kv_heads]
        self.length = 0
        self.evicted = 0
        self.rounds = 0
        self.margins: list[float] = []
        self.centres = [[np.array(a, np.float64) for a in pair] for pair in statistics] if statistics else None

    def append(self, tokens: Sequence[int]) -> None:
        fresh = list(range(len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += [int(t) for t in tokens]
        self.evicted_at = [np.pad(times, ((0, 0), (0, len(fresh))), constant_values=NEVER) for times in self.evicted_at]
        for layer in self.rows:
            for head in layer:
                head += fresh
        self.length = len(self.rows[0][0])

    def visible(self, layer: int, count: int) -> np.ndarray:
        """[Hkv,N,N]: may query t see key n?"""
        query, key = np.arange(count)[:, None], np.arange(count)[None, :]
        return (key <= query)[None] & (query[None] < self.evicted_at[layer][:, None, :])

    def evict(self, plan: list[list[list[int]]]) -> None:
        """Keep the rows of plan [L][Hkv]; queries from now on do not see the others."""
        for layer, heads in enumerate(plan):
            for head, kept in enumerate(heads):
                before = self.rows[layer][head]
                self.rows[layer][head] = [before[row] for row in kept]
                gone = sorted(set(before) - set(self.rows[layer][head]))
                self.evicted_at[layer][head, gone] = len(self.tokens)
        evicted = self.length - len(plan[0][0])
        self.evicted += evicted
        self.rounds += evicted > 0


class MaskedReference:
    """A batch of sequences in a decoder with eviction, run one by one over their full history.

    A step appends tokens, attends, and then, where the rows held have reached the limit (budget + interval
    unless told otherwise), plans an eviction down to the budget, which the queries of the next step are the
    first to feel.

    stats: per layer (q_mean [Hq,D], q_abs [Hq,R/2]); with online centres the state's start, zeros where None.
    pinned: rows of each sequence's prompt that are never evicted; by default none, and for `prompt="pinned"`
    what `prefill` is given. ropes: the rotations of the layers with full attention, where `layer_ropes` cannot tell.

    Layers choose their rows together, as the scope says, with those of the same query heads, KV heads, head dim and
    number of bands; a layer without bands joins the first ones of its heads.

    Counters (lists, one entry a sequence): rows_held after the planned eviction, length before it,
    rows_evicted per layer and KV head, rounds that evicted something, and margins, the closest decision of
    every round (near the rounding of float32, another implementation may rightly choose otherwise).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stats: Statistics | None,
        eviction: EvictionConfig,
        pinned: list[int] | None = None,
        pairing: str | None = None,
        ropes: list[LayerRope] | None = None,
    ):
        if eviction.policy.needs_statistics and stats is None:
            raise ValueError("calibrated centres need stats; make them with calibrate_by_hooks")
        self.model = model
        self.eviction = eviction
        self.stats = stats
        self.pinned = pinned
        self.ropes = layer_ropes(model, pairing) if ropes is None else ropes
        _, layers = forward(model, [0], lambda layer, count: np.ones((ANY, count, count), bool))
        self.heads, self.kv_heads = ([len(side[which]) for side in layers] for which in (0, 1))
        self.groups = self._groups()
        self.sequences: list[_Sequence] = []

    # -- feeding ---------------------------------------------------------------------------------------------

    def feed(self, tokens: Sequence[Sequence[int]], limit: int | list[int] | None = None) -> list[torch.Tensor]:
        """One step: any number of tokens for each sequence (none is allowed) -> logits [n_new,V] of each.

        limit: rows at which this step plans an eviction, one for all or one a sequence.
        """
        self._start(len(tokens), None)
        results = []
        for b, new in enumerate(tokens):
            results.append(self._step(b, new, self._limit(b, limit), step_size=len(new)))
        return results

    def prefill(
        self, prompts: Sequence[Sequence[int]], chunk: int, limit: int | list[int] | None = None
    ) -> list[torch.Tensor]:
        """Feed whole prompts in steps of `chunk` tokens, the first step the partial one -> logits [n,V]."""
        self._start(len(prompts), [len(p) for p in prompts] if self.eviction.prompt == "pinned" else None)
        results = []
        for b, prompt in enumerate(prompts):
            cuts = list(range(len(prompt), 0, -chunk))[::-1]  # ends of the steps
            parts = [prompt[max(end - chunk, 0) : end] for end in cuts]
            logits = [self._step(b, part, self._limit(b, limit), step_size=len(part)) for part in parts]
            results.append(torch.cat(logits))
        return results

    def decode(self, tokens: Sequence[Sequence[int]], limit: int | list[int] | None = None) -> list[torch.Tensor]:
        """Teacher-forced steps of one token each -> logits [n,V].

        Steps up to the next eviction share a forward pass, which changes nothing: no query sees a later key.
        """
        self._start(len(tokens), None)
        results = []
        for b, rest in enumerate(tokens):
            threshold, logits, done = self._limit(b, limit), [], 0
            while done < len(rest):
                count = max(1, threshold - len(self.sequences[b].rows[0][0]))
                part = rest[done : done + count]
                logits.append(self._step(b, part, threshold, step_size=1))
                done += len(part)
            results.append(torch.cat(logits) if logits else self._nothing())
        return results

    def _start(self, batch: int, prompt_lengths: list[int] | None) -> None:
        if self.sequences:
            if len(self.sequences) != batch:
                raise ValueError(f"{batch} sequences given, the batch has {len(self.sequences)}")
            return
        pinned = self.pinned if self.pinned is not None else prompt_lengths
        if pinned is None:
            if self.eviction.prompt == "pinned":
                raise ValueError("a pinned prompt needs `pinned`, or `prefill` as the first call")
            pinned = [0] * batch
        online = self.eviction.policy.name == "triattention" and self.eviction.policy.centres == "online"
        stats = self.stats
        if online and stats is None:
            stats = [
                (np.zeros((heads, rope.head_dim)), np.zeros((heads, len(rope.first))))
                for heads, rope in zip(self.heads, self.ropes, strict=True)
            ]
        for rows in pinned:
            self.sequences.append(_Sequence(self.kv_heads, stats, rows))

    def _groups(self) -> list[list[int]]:
        """The layers that choose their rows together."""
        shapes: dict[tuple[int, int, int, int], list[int]] = {}
        kinds = list(zip(self.heads, self.kv_heads, (rope.head_dim for rope in self.ropes), strict=True))
        bands = [len(rope.first) for rope in self.ropes]
        for layer, kind in enumerate(kinds):
            alike = [n for other, n in zip(kinds, bands, strict=True) if other == kind and n]
            shapes.setdefault((*kind, bands[layer] or (alike or [0])[0]), []).append(layer)
        return list(shapes.values())

    def _limit(self, b: int, limit: int | list[int] | None) -> int:
        if limit is None:
            return self.eviction.budget + self.eviction.interval
        return limit if isinstance(limit, int) else limit[b]

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(0, self.model.config.vocab_size)

    def _step(self, b: int, tokens: Sequence[int], limit: int, step_size: int) -> torch.Tensor:
        if not len(tokens):
            return self._nothing()
        sequence = self.sequences[b]
        sequence.append(tokens)
        full = full_layers(self.model.config)
        logits, layers = forward(self.model, sequence.tokens, lambda layer, n: sequence.visible(full.index(layer), n))
        policy = self.eviction.policy
        if policy.name == "triattention" and policy.centres == "online":
            self._follow(sequence, [q[:, -len(tokens) :] for q, _ in layers])
        if sequence.length >= limit:
            keep = min(self.eviction.budget, sequence.length)
            first = len(sequence.tokens) - step_size  # absolute position of the step's first token
            scores = self._scores(sequence, [k for _, k in layers], first)
            front = max(self.eviction.sinks, sequence.pinned)
            plan: list[list[list[int]]] = [[] for _ in scores]
            margins = []
            for group in self.groups:
                together = np.stack([scores[layer] for layer in group])
                recent, scope, kv_heads = self.eviction.recent, self.eviction.scope, self.kv_heads[group[0]]
                chosen, margin = select_rows(together, keep, front, recent, scope, kv_heads)
                margins.append(margin)
                for layer, heads in zip(group, chosen, strict=True):
                    plan[layer] = heads
            sequence.margins.append(min(margins))
            sequence.evict(plan)
        return logits[-len(tokens) :]

    # -- scoring ---------------------------------------------------------------------------------------------

    def now(self, sequence: _Sequence) -> int:
        """T: the absolute position of the next token, whatever was evicted."""
        return len(sequence.tokens)

    def _follow(self, sequence: _Sequence, queries: list[np.ndarray]) -> None:
        """Online centres: running means of the sequence's own pre-RoPE queries [Hq,n_new,D]."""
        assert sequence.centres is not None
        for rope, state, rotated in zip(self.ropes, sequence.centres, queries, strict=True):
            count = rotated.shape[1]
            places = np.arange(len(sequence.tokens) - count, len(sequence.tokens))
            query = rope.undo(rotated, places) / rope.grows(places)[:, None]
            size = np.abs(rope.bands(query))
            for n in range(count):
                state[0] = state[0] * DECAY + (1 - DECAY) * query[:, n]
                if len(rope.first):
                    state[1] = state[1] * DECAY + (1 - DECAY) * size[:, n]

    def _scores(self, sequence: _Sequence, keys: list[np.ndarray], first: int) -> list[np.ndarray]:
        """Scores [Hq,rows held], by layer, of the rotated keys [Hkv,N,D]."""
        policy = self.eviction.policy
        scores = [np.zeros((heads, sequence.length)) for heads in self.heads]
        for layer, rotated in enumerate(keys):
            rope, heads, kv_heads = self.ropes[layer], self.heads[layer], self.kv_heads[layer]
            number = next(group.index(layer) for group in self.groups if layer in group)
            plain = rope.undo(rotated, np.arange(rotated.shape[1])) if policy.name == "triattention" else None
            for head in range(heads):
                kv_head = head * kv_heads // heads
                rows = np.array(sequence.rows[layer][kv_head])
                if plain is not None:
                    assert sequence.centres is not None
                    centre, magnitude = sequence.centres[layer]
                    scores[layer][head] = explicit_scores(
                        plain[kv_head, rows],
                        rows,
                        self.now(sequence),
                        centre[head],
                        magnitude[head] if len(rope.first) else np.zeros(0),
                        rope,
                        policy,
                    )
                elif policy.name == "key-norm":
                    scores[layer][head] = [-math.sqrt(float(k @ k)) for k in rotated[kv_head, rows].astype(float)]
                elif policy.name == "streaming":
                    scores[layer][head] = range(len(rows))
                elif policy.name == "random":
                    scores[layer][head] = [random_score(first, row, head, number) for row in range(len(rows))]
                else:
                    raise ValueError(f"the reference does not know policy {policy.name!r}")
        return scores

    # -- reading ---------------------------------------------------------------------------------------------

    def kept(self, layer: int, head: int, sequence: int = 0) -> list[int]:
        """Absolute positions that the next query of that KV head can see (itself left out), ascending."""
        return list(self.sequences[sequence].rows[layer][head])

    @property
    def length(self) -> list[int]:
        return [s.length for s in self.sequences]

    @property
    def rows_held(self) -> list[int]:
        return [len(s.rows[0][0]) for s in self.sequences]

    @property
    def rows_evicted(self) -> list[int]:
        return [s.evicted for s in self.sequences]

    @property
    def rounds(self) -> list[int]:
        return [s.rounds for s in self.sequences]

    @property
    def margins(self) -> list[list[float]]:
        return [s.margins for s in self.sequences]


def calibrate_by_hooks(
    model: PreTrainedModel,
    token_lists: Sequence[Sequence[int]],
    pairing: str | None = None,
    ropes: list[LayerRope] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Means of un-rotated queries over all tokens, float64: per layer (q_mean [Hq,D], q_abs [Hq,R/2])."""
    ropes = layer_ropes(model, pairing) if ropes is None else ropes
    seen: list[list[np.ndarray]] = [[] for _ in ropes]

    def causal(layer: int, count: int) -> np.ndarray:
        return np.tri(count, dtype=bool)[None].repeat(ANY, 0)

    for tokens in token_lists:
        _, layers = forward(model, tokens, causal)
        for rope, queries, (rotated, _) in zip(ropes, seen, layers, strict=True):
            places = np.arange(len(tokens))
            queries.append(rope.undo(rotated, places) / rope.grows(places)[:, None])
    results = []
    for rope, queries in zip(ropes, seen, strict=True):
        every = np.concatenate(queries, 1)  # [Hq,N,D]
        results.append((every.mean(1), np.abs(rope.bands(every)).mean(1)))
    return results
