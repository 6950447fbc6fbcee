"""compare: what eviction costs, against the same engine without eviction, on text it is fed (teacher-forced).

The dense and the evicting sessions read the same tokens chunk by chunk; caches are really shrunk. Per position:
KL(dense || evicting) of the next-token distributions in nats, whether both prefer the same token, and the
perplexity of each. The KL has a heavy tail (names copied from far back), so the report gives mean, 95th percentile,
standard error over texts, and a split by whether the next token continues a bigram seen long ago, recently, or never.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler.engine import Engine, load
from keysieve.compiler.progress import Progress
from keysieve.compiler.session import Session
from keysieve.compiler.text import iter_texts, token_chunks
from keysieve.errors import ConfigError, EngineError

CHUNK = 128  # tokens a step
MAX_TOKENS = 2048  # tokens of each text
FAR = 256  # a bigram last seen more than this many tokens ago counts as copied from far back
SPLITS = ("far", "recent", "new")


@dataclass
class Fidelity:
    """Per-position results of one evicting session over several texts; one array a text."""

    kl: list[np.ndarray] = field(default_factory=list)
    agree: list[np.ndarray] = field(default_factory=list)
    loss: list[np.ndarray] = field(default_factory=list)
    dense_loss: list[np.ndarray] = field(default_factory=list)
    split: list[np.ndarray] = field(default_factory=list)
    evicted: int = 0

    def summary(self) -> dict[str, Any]:
        """The numbers of one report row."""
        kl, split = np.concatenate(self.kl), np.concatenate(self.split)
        means = np.array([text.mean() for text in self.kl])
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
        return {
            "texts": len(self.kl),
            "tokens": len(kl),
            "rows_evicted": self.evicted,
            "kl": float(kl.mean()),
            "kl_p95": float(np.percentile(kl, 95)),
            "kl_se": error,
            "top1": float(np.concatenate(self.agree).mean()),
            "ppl": float(np.exp(np.concatenate(self.loss).mean())),
            "ppl_dense": float(np.exp(np.concatenate(self.dense_loss).mean())),
            "kl_split": {
                name: {"tokens": int((split == n).sum()), "kl": float(kl[split == n].mean())}
                for n, name in enumerate(SPLITS)
                if (split == n).any()
            },
        }


def compare(
    source: Path | str | Engine,
    texts: Sequence[Path],
    budgets: Sequence[int] = (256, 512, 1024),
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a bundle on the first `max_tokens` tokens of every text, at every budget.

    Returns {"rows": [{"policy", "budget", "scope", "tokens", "kl", "kl_p95", "kl_se", "top1", "ppl", "ppl_dense",
    "kl_split", ...}, ...]}. A budget that evicts nothing on these texts is an error, not a perfect score.
    """
    engine = source if isinstance(source, Engine) else load(source, threads)
    progress = progress or Progress()
    if not texts or not budgets:
        raise ConfigError("compare needs at least one text and one budget")
    eviction = engine.manifest["eviction"]
    results = {budget: Fidelity() for budget in budgets}
    for text in texts:
        with progress.stage(Path(text).name[:16]) as stage:
            tokens = read_tokens(engine, Path(text), max_tokens)
            sessions = {budget: evicting_session(engine, budget) for budget in budgets}
            dense = engine.session(dense=True, capacity=len(tokens))
            measure(dense, sessions, tokens, results)
            stage.note(f"{len(tokens):,} tokens")
    for budget, result in results.items():
        if not result.evicted:
            raise EngineError(f"budget {budget} evicts nothing on these texts; give longer texts or smaller budgets")
    rows = [
        {"policy": policy_name(eviction["policy"]), "budget": budget, "scope": eviction["scope"], **result.summary()}
        for budget, result in results.items()
    ]
    return {"rows": rows}


def policy_name(policy: Mapping[str, Any]) -> str:
    """The policy as reports name it: online centres and switched-off terms are part of the name."""
    name = str(policy["name"])
    if name != "triattention":
        return name
    name += "-online" if policy["centres"] == "online" else ""
    name += "" if policy["norm"] else "-trig-only"
    name += "" if policy["trig"] else "-norm-only"
    return name + ("-max" if policy["aggregation"] == "max" else "")


def read_tokens(engine: Engine, text: Path, max_tokens: int) -> list[int]:
    """The first tokens of a text."""
    if engine.tokenizer is None:
        raise EngineError(f"{engine.bundle.path} has no tokenizer, so it cannot read {text}")
    chunks = token_chunks(iter_texts([text]), engine.tokenizer, CHUNK, max_tokens)
    return [token for chunk in chunks for token in chunk]


def evicting_session(engine: Engine, budget: int) -> Session:
    """A session that reads text in chunks of CHUNK at that budget."""
    interval = int(engine.manifest["eviction"]["interval"])
    return engine.session(budget=budget, capacity=budget + max(interval, CHUNK))


def measure(
    dense: Session, sessions: Mapping[Any, Session], tokens: Sequence[int], results: Mapping[Any, Fidelity]
) -> None:
    """Feed one text to all sessions in lockstep and append what it gives to their results."""
    parts: dict[Any, list[tuple[np.ndarray, ...]]] = {name: [] for name in sessions}
    for start in range(0, len(tokens) - 1, CHUNK):
        ids = np.asarray(tokens[start : start + CHUNK])
        targets = np.asarray(tokens[start + 1 : start + 1 + len(ids)])
        wanted = np.arange(len(targets))[None]
        count = np.array([len(ids)], np.int32)
        following = max(1, min(CHUNK, len(tokens) - start - len(ids)))
        expected = log_softmax(dense.step(ids[None], count, wanted, following)[0])
        for name, session in sessions.items():
            found = log_softmax(session.step(ids[None], count, wanted, following)[0])
            kl = (np.exp(expected) * (expected - found)).sum(-1)
            agree = expected.argmax(-1) == found.argmax(-1)
            rows = np.arange(len(targets))
            parts[name].append((kl, agree, -found[rows, targets], -expected[rows, targets]))
    split = copy_split(tokens)
    for name, session in sessions.items():
        kl, agree, loss, dense_loss = (np.concatenate(column) for column in zip(*parts[name], strict=True))
        result = results[name]
        result.kl.append(kl)
        result.agree.append(agree)
        result.loss.append(loss)
        result.dense_loss.append(dense_loss)
        result.split.append(split)
        result.evicted += session.counters.rows_evicted[0]


def copy_split(tokens: Sequence[int]) -> np.ndarray:
    """For every position but the last, the index in SPLITS: was this token and its successor seen before, and when?"""
    last_seen: dict[tuple[int, int], int] = {}
    result = np.empty(len(tokens) - 1, np.int8)
    for position, bigram in enumerate(pairwise(tokens)):
        seen = last_seen.get(bigram)
        result[position] = 2 if seen is None else 0 if position - seen > FAR else 1
        last_seen[bigram] = position
    return result


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[N,V] -> [N,V], in float32 with float64 sums."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
