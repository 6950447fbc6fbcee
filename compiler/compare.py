"""compare: what eviction costs, against the same engine without eviction, on text it is fed (teacher-forced).

The dense and the evicting sessions read the same tokens chunk by chunk; caches are really shrunk. Per position:
KL(dense || evicting) of the next-token distributions in nats, whether both prefer the same token, and the
perplexity of each. The KL has a heavy tail (names copied from far back), so the report gives mean, 95th percentile,
standard error over texts, and a split by whether the next token continues a bigram seen long ago, recently, or never.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler.config import TERMS
from keysieve.compiler.engine import Engine, load
from keysieve.compiler.progress import Progress
from keysieve.compiler.runtimes import Session
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
    device: str = "cpu",
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure a bundle on the first `max_tokens` tokens of every text, at every budget.

    threads, device, compiled: of keysieve.load, where source is a path.
    Returns {"rows": [{"policy", "heads", "budget", "scope", "tokens", "kl", "kl_p95", "kl_se", "top1", "ppl",
    "ppl_dense", "kl_split", ...}, ...]}. A budget that evicts nothing on these texts is an error, not a perfect score.
    """
    engine = source if isinstance(source, Engine) else load(source, threads, device, compiled=compiled)
    progress = progress or Progress()
    if not texts or not budgets:
        raise ConfigError("compare needs at least one text and one budget")
    eviction = engine.manifest["eviction"]
    results = {budget: Fidelity() for budget in budgets}
    read_texts = [read_tokens(engine, Path(text), max_tokens) for text in texts]
    longest = max(len(tokens) for tokens in read_texts)
    for budget in budgets:
        if longest < budget + int(eviction["interval"]):
            raise EngineError(
                f"budget {budget} evicts nothing: the longest text has {longest:,} tokens, and the first eviction "
                f"comes at {budget + int(eviction['interval']):,} rows; give longer texts or smaller budgets"
            )
    for text, tokens in zip(texts, read_texts, strict=True):
        with progress.stage(Path(text).name[:16]) as stage:
            sessions = {budget: evicting_session(engine, budget) for budget in budgets}
            dense = engine.session(dense=True, capacity=len(tokens), chunk=CHUNK)
            measure(read(dense, tokens), sessions, tokens, results)
            for session in (dense, *sessions.values()):
                session.close()
            stage.note(f"{len(tokens):,} tokens")
    rows = [
        {
            "policy": policy_name(eviction["policy"]),
            "heads": eviction["heads"],
            "budget": budget,
            "scope": eviction["scope"],
            **result.summary(),
        }
        for budget, result in results.items()
    ]
    return {"rows": rows}


def policy_name(policy: Mapping[str, Any]) -> str:
    """The policy as reports name it: online centres and switched-off terms are part of the name."""
    name = str(policy["name"])
    usual = {"sieve": "online", "triattention": "calibrated"}.get(name)
    if usual is None:
        return name
    if name == "sieve" and tuple(policy["terms"]) != TERMS:
        name += f"-{'-'.join(policy['terms'])}"
    name += f"-{policy['centres']}" if policy["centres"] != usual else ""
    name += "" if policy["norm"] else "-trig-only"
    name += "" if policy["trig"] else "-norm-only"
    return name + ("-max" if policy["aggregation"] == "max" else "")


def read_tokens(engine: Engine, text: Path, max_tokens: int) -> list[int]:
    """The first tokens of a text."""
    if engine.tokenizer is None:
        raise EngineError(f"{engine.bundle.path} has no tokenizer, so it cannot read {text}")
    chunks = token_chunks(iter_texts([text]), engine.tokenizer, CHUNK, max_tokens)
    tokens = [token for chunk in chunks for token in chunk]
    if len(tokens) < 2:
        raise ConfigError(f"{text} has one token, so there is no next one to compare; give a longer text")
    return tokens


def evicting_session(engine: Engine, budget: int) -> Session:
    """A session that reads text in chunks of CHUNK at that budget."""
    interval = int(engine.manifest["eviction"]["interval"])
    return engine.session(budget=budget, capacity=budget + max(interval, CHUNK), chunk=CHUNK)


def read(session: Session, tokens: Sequence[int]) -> Iterator[np.ndarray]:
    """Feed a text in chunks of CHUNK; yields every chunk's logits [n,V], in a buffer that the next one reuses."""
    for start in range(0, len(tokens), CHUNK):
        ids = np.asarray(tokens[start : start + CHUNK])
        following = max(1, min(CHUNK, len(tokens) - start - len(ids)))
        yield session.step(ids[None], np.array([len(ids)], np.int32), np.arange(len(ids))[None], following)[0]


def measure(
    dense: Iterable[np.ndarray], sessions: Mapping[Any, Session], tokens: Sequence[int], results: Mapping[Any, Fidelity]
) -> None:
    """Feed one text to all sessions, compare with the dense logits of every chunk, and append to the results."""
    parts: dict[Any, list[tuple[np.ndarray, ...]]] = {name: [] for name in sessions}
    readers = [read(session, tokens) for session in sessions.values()]
    targets = np.append(np.asarray(tokens[1:]), -1)
    for number, (expected, *founds) in enumerate(zip(dense, *readers, strict=True)):
        wanted = targets[number * CHUNK :][: len(expected)]
        wanted = wanted[wanted >= 0]  # the last token has no next one
        rows = np.arange(len(wanted))
        expected = expected[rows]
        expected_log_sum = log_sum(expected)
        chances = np.exp(expected - expected_log_sum)
        favourite = expected.argmax(-1)
        dense_loss = expected_log_sum[:, 0] - expected[rows, wanted]
        for name, found in zip(sessions, founds, strict=True):
            found = found[rows]
            found_log_sum = log_sum(found)
            # sum p (log p - log q), with log p = x - log_sum(x)
            kl = np.einsum("nv,nv->n", chances, expected - found) + (found_log_sum - expected_log_sum)[:, 0]
            agree = favourite == found.argmax(-1)
            loss = found_log_sum[:, 0] - found[rows, wanted]
            parts[name].append((kl, agree, loss, dense_loss))
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


def log_sum(logits: np.ndarray) -> np.ndarray:
    """log sum exp over the last axis: [N,V] -> [N,1]."""
    highest = logits.max(-1, keepdims=True)
    return highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
