"""The slow reference of a decoder that evicts: it keeps every token and masks what was evicted.

It shares no code with keysieve's passes and kernels. Every step runs the whole history through the model,
without a cache; which key a query may see is remembered as the time at which each key was evicted. Scores
come from un-rotated keys and the explicit sum over the future offsets (TriAttention, arXiv 2604.04921), in
float64; rows are chosen by plain loops.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from keysieve.compiler.config import EvictionConfig
from support.explicit_scores import explicit_scores, random_score, select_rows
from support.layer_rope import LayerRope, full_layers, layer_ropes
from support.masked_forward import forward

DECAY = 0.5 ** (1 / 128)  # of online centres, per token
NEVER = np.iinfo(np.int64).max
ANY = 64  # KV heads of a layer that is not known yet, at most

Statistics = Sequence[tuple[np.ndarray, np.ndarray]]
"""Per layer: q_mean [Hq,D] in the layout of pre-RoPE queries, q_abs [Hq,R/2] (ignored without RoPE)."""


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
        evicted = 0
        for layer, heads in enumerate(plan):
            for head, kept in enumerate(heads):
                before = self.rows[layer][head]
                self.rows[layer][head] = [before[row] for row in kept]
                gone = sorted(set(before) - set(self.rows[layer][head]))
                evicted = max(evicted, len(gone))
                self.evicted_at[layer][head, gone] = len(self.tokens)
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

    classes: of the KV heads of every layer, and the budget of each class, for heads that have budgets of their own.
    Where the rows of one class reach its budget + interval, all evict that have more than their budget. Feed such a
    reference with `feed`. gates: per layer W [Hkv,d] and b [Hkv], for policies that add what they foretell.

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
        classes: tuple[list[list[int]], list[int]] | None = None,
        gates: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        if eviction.policy.needs_statistics and stats is None:
            raise ValueError("calibrated centres need stats; make them with calibrate_by_hooks")
        self.model = model
        self.eviction = eviction
        self.stats = stats
        self.pinned = pinned
        self.classes = classes
        self.gates = gates
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
        online = self.eviction.policy.trigonometric and self.eviction.policy.centres == "online"
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
        hidden: list[np.ndarray] = []
        see = lambda layer, n: sequence.visible(full.index(layer), n)  # noqa: E731
        logits, layers = forward(self.model, sequence.tokens, see, hidden)
        self._foretell(hidden)
        policy = self.eviction.policy
        if policy.trigonometric and policy.centres == "online":
            self._follow(sequence, [q[:, -len(tokens) :] for q, _ in layers])
        if self.classes is not None:
            self._evict_classes(sequence, [k for _, k in layers], step_size)
        elif sequence.length >= limit:
            keep = min(self.eviction.budget, sequence.length)
            first = len(sequence.tokens) - step_size  # absolute position of the step's first token
            scores = self._scores(sequence, [k for _, k in layers], first)
            front = max(self.eviction.sinks, sequence.pinned)
            plan: list[list[list[int]]] = [[] for _ in scores]
            margins = []
            for group in self.groups:
                together = np.stack([np.stack(scores[layer]) for layer in group])
                recent, scope, kv_heads = self.eviction.recent, self.eviction.scope, self.kv_heads[group[0]]
                more = self._utility(sequence, group)
                chosen, margin = select_rows(together, keep, front, recent, scope, kv_heads, more)
                margins.append(margin)
                for layer, heads in zip(group, chosen, strict=True):
                    plan[layer] = heads
            sequence.margins.append(min(margins))
            sequence.evict(plan)
        return logits[-len(tokens) :]

    def _evict_classes(self, sequence: _Sequence, keys: list[np.ndarray], step_size: int) -> None:
        """Every head whose class is due chooses among its own rows."""
        assert self.classes is not None and self.eviction.scope == "per_layer_per_head"
        of_heads, budgets = self.classes
        rows = sequence.rows
        beyond = {
            (layer, head): len(rows[layer][head]) - budgets[its]
            for layer, classes in enumerate(of_heads)
            for head, its in enumerate(classes)
        }
        if max(beyond.values()) < self.eviction.interval:
            return
        due = [place for place, more in beyond.items() if more > 0]
        scores = self._scores(sequence, keys, len(sequence.tokens) - step_size)
        front, recent, margins = max(self.eviction.sinks, sequence.pinned), self.eviction.recent, []
        plan = [[list(range(len(held))) for held in heads] for heads in rows]
        for layer, head in due:
            group = self.heads[layer] // self.kv_heads[layer]
            own = np.stack(scores[layer][head * group : (head + 1) * group])[None]
            keep = budgets[of_heads[layer][head]]
            more = self._utility(sequence, [layer], head)
            chosen, margin = select_rows(own, keep, front, recent, self.eviction.scope, 1, more)
            plan[layer][head] = chosen[0][0]
            margins.append(margin)
        sequence.margins.append(min(margins))
        sequence.evict(plan)

    def _foretell(self, hidden: list[np.ndarray]) -> None:
        """What the gates say of every token [Hkv,N], by layer."""
        pairs = zip(hidden, self.gates or (), strict=False)
        self.utilities = [(h.astype(float) @ weight.T + bias).T for h, (weight, bias) in pairs]

    def _utility(self, sequence: _Sequence, layers: list[int], head: int | None = None) -> np.ndarray | None:
        """[l,Hkv,rows held], of one KV head or of all."""
        if self.gates is None:
            return None
        heads = range(self.kv_heads[layers[0]]) if head is None else [head]
        return np.array([[self.utilities[layer][h][sequence.rows[layer][h]] for h in heads] for layer in layers])

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

    def _scores(self, sequence: _Sequence, keys: list[np.ndarray], first: int) -> list[list[np.ndarray]]:
        """Scores [rows held] of every query head, by layer, of the rotated keys [Hkv,N,D]."""
        policy = self.eviction.policy
        scores = [[np.zeros(0)] * heads for heads in self.heads]
        for layer, rotated in enumerate(keys):
            rope, heads, kv_heads = self.ropes[layer], self.heads[layer], self.kv_heads[layer]
            number = next(group.index(layer) for group in self.groups if layer in group)
            plain = rope.undo(rotated, np.arange(rotated.shape[1])) if policy.trigonometric else None
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
                    norms = [-math.sqrt(float(k @ k)) for k in rotated[kv_head, rows].astype(float)]
                    scores[layer][head] = np.array(norms)
                elif policy.name == "sieve":  # the gates alone
                    scores[layer][head] = np.zeros(len(rows))
                elif policy.name == "streaming":
                    scores[layer][head] = np.arange(len(rows), dtype=float)
                elif policy.name == "random":
                    chances = [random_score(first, row, head, number) for row in range(len(rows))]
                    scores[layer][head] = np.array(chances)
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
