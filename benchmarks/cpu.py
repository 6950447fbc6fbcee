"""Every contestant that runs on a CPU, side by side: decoding, prefill, memory, eviction rounds, endless text, KL.

    python benchmarks/cpu.py [--workloads decode,...] [--only CONTESTANT,...] [--weights int4,...] [--kv-dtype float16]
                             [--history 8192,...] [--budgets 512,...] [--batch 1,8] [--pairs 5] [--threads 1]
                             [--official DIR] [--ignore-position-limit] [--endless] [--quick] [--report]

Contestants run in processes of their own (benchmarks/contestants), on `threads` cores each. All of one comparison stay
loaded and take turns, A B C A B C ...: a ratio is the median over turns of the ratios of neighbours. What is measured
is merged into benchmarks/results/cpu.json after every comparison, and docs/benchmarks.md is made of that file;
--report makes it only. --quick measures little and writes to build/bench/quick.json: it shows that everything runs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from contestants.process import Worker, WorkerError
from contestants.setup import INTERVAL, MODEL, OFFICIAL_STATISTICS, ROOT, SETUPS, WORK, SetupError, python_of
from cpu_report import write_report
from ratios import Entry, compare, merged, round_seconds

from keysieve.compiler.bundle import write_atomically
from keysieve.errors import KeySieveError

RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
QUICK = WORK / "quick.json"
ENGINE = ("compiler", "export", "kernels", "passes", "plugins")  # the folders that what is measured comes from
VARIANTS = [  # contestant, policy, weights, kv_dtype
    ("keysieve", "triattention", "int4", "float32"),
    ("keysieve", "triattention", "int4", "float16"),
    ("keysieve-dense", "dense", "int4", "float32"),
    ("keysieve-dense", "dense", "int4", "float16"),
    ("onnxruntime", "plain", "int4", "float32"),
    ("openvino-genai", "norm_sum", "int4", "u8"),
    ("openvino-genai", "norm_sum-f32", "int4", "u8"),
    ("llama.cpp", "window", "int4", "float16"),
    ("keysieve", "triattention", "float32", "float32"),
    ("keysieve-dense", "dense", "float32", "float32"),
    ("hf", "dense", "float32", "float32"),
    ("torch-compile", "dense", "float32", "float32"),
    ("kvpress", "knorm", "float32", "float32"),
    ("kvpress", "snapkv", "float32", "float32"),
    # in bfloat16, which it chooses for float32 weights, it ends with SIGFPE where the CPU grants no AMX
    ("openvino-genai", "norm_sum-f32", "float32", "float32"),
    ("openvino-genai", "norm_sum-f32", "float32", "u8"),
    ("official", "triattention", "float32", "float32"),
]
ALL_ROWS = ("dense", "plain")  # policies without a budget
WIDE = ("hf", "torch-compile", "kvpress")  # a prompt of 8k times 8 takes them ten minutes
LONG = (*WIDE, "official", "keysieve-dense")  # and one of 32k longer
ONE_SEQUENCE = ("official",)
PREFILL = ("keysieve", "hf", "openvino-genai", "llama.cpp")  # others read a prompt as one of these does
QUANTISED = [("int8", "float32"), ("int4", "float32"), ("float32", "float16"), ("int4", "float16")]

COUNTERS = ("tokens", "rows_held", "rows_evicted", "rounds")


@dataclass
class Sizes:
    """How much is measured."""

    histories: list[int] = field(default_factory=lambda: [2048, 8192, 32768])
    budgets: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    pairs: int = 5
    batched: tuple[int, int] = (8192, 2048)  # history and budget at which batches are measured
    prefill: int = 8192  # tokens of a prompt; memory: and of what is generated after it
    memory: int = 512
    chunks: tuple[int, ...] = (32, 64, 128, 256, 512)
    chunk_prompt: int = 4096
    length: tuple[int, int] = (4096, 32768)
    fidelity: int = 1024
    endless: int = 100_000
    endless_budget: int = 1024

    @classmethod
    def quick(cls) -> "Sizes":
        return cls([512], [256], 2, (512, 256), 512, 128, (32, 128), 512, (512, 1024), 256, 1024, 256)


class Benchmark:
    """Measures comparisons, and merges what came of them into one file."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes, output: Path):
        self.options, self.sizes, self.output = options, sizes, output
        self.prompt = _prompt_tokens(max(*sizes.histories, *sizes.length, sizes.prefill))
        self.limit = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
        self.versions: dict[str, Any] = {}
        self.revision = _revision()
        self.loading: dict[Entry, dict[str, float]] = {}  # seconds, and resident memory then

    # -- comparisons ---------------------------------------------------------------------------------------------
    def decode(self) -> None:
        """Turns of one interval: each holds one round of everybody who evicts in rounds."""
        for weights in ("int4", "float32"):
            for history in self.sizes.histories:
                for budget in self.sizes.budgets:
                    for batch in self.options.batch:
                        if budget < history and (batch == 1 or (history, budget) == self.sizes.batched):
                            entries = self._entries(weights, history, budget, batch)
                            if entries and weights == "float32" and batch == 1:  # those who know float32 only
                                small = self._entries("int4", history, budget, batch)
                                entries += [entry for entry in small if entry.contestant == "keysieve"]
                            self._decode(entries)

    def _decode(self, entries: list[Entry], workload: str = "decode") -> None:
        with ExitStack() as stack:
            workers = self._start(stack, entries)
            for entry, worker in list(workers.items()):
                self._guarded(workers, entry, lambda w=worker, e=entry: self._warm_up(w, e))
            samples: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in workers}
            for _ in range(self.sizes.pairs):
                for entry, worker in list(workers.items()):
                    self._guarded(workers, entry, lambda w=worker, e=entry: samples[e].append(self._turn(w, e)))
            samples = {entry: samples[entry] for entry in workers}
            rows = [self._decoded(workload, entry, taken) for entry, taken in samples.items()]
        self._save(workload, rows, samples)

    def _warm_up(self, worker: Worker, entry: Entry) -> None:
        worker("prefill", tokens=self.prompt[: entry.history])
        worker("decode", steps=INTERVAL)

    def _turn(self, worker: Worker, entry: Entry) -> dict[str, Any]:
        if entry.policy == "plain":  # back to the rows that the others keep
            worker("prefill", tokens=self.prompt[: entry.history])
        return worker("decode", steps=INTERVAL)

    def _decoded(self, workload: str, entry: Entry, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        row = self._row(workload, entry, samples)
        if entry.budget is not None:
            for name, clock in (("round_ms", "wall"), ("round_ms_cpu", "cpu")):
                row[name] = 1e3 * round_seconds([sample[f"step_{clock}_s"] for sample in samples])
        return row

    def length(self) -> None:
        """The same budget after a short and after a long history."""
        budget = max(self.sizes.budgets)
        chosen = [entry for entry in self._entries("int4", 0, budget, 1) if entry.contestant == "keysieve"]
        for entry in chosen:
            short, long = (replace(entry, history=history) for history in self.sizes.length)
            if self._allowed(long):
                self._decode([long, short], "length")

    def prefill(self) -> None:
        """The whole prompt, from an empty cache, at the largest budget."""
        for weights in ("int4", "float32"):
            entries = self._entries(weights, self.sizes.prefill, max(self.sizes.budgets), 1)
            entries = [entry for entry in entries if entry.contestant in PREFILL]
            with ExitStack() as stack:
                workers = self._start(stack, entries)
                samples: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in workers}
                for worker in workers.values():
                    worker("prefill", tokens=self.prompt[:512])
                for _ in range(self.sizes.pairs):
                    for entry, worker in workers.items():
                        samples[entry].append(worker("prefill", tokens=self.prompt[: entry.history]))
                rows = [self._row("prefill", entry, taken) for entry, taken in samples.items()]
            self._save("prefill", rows, samples)

    def chunk(self) -> None:
        """How many prompt tokens a step should take: sizes in turns, each in a process of its own."""
        for entry in self._entries("int4", self.sizes.chunk_prompt, max(self.sizes.budgets), 1):
            if entry.contestant != "keysieve":
                continue
            with ExitStack() as stack:
                workers = {chunk: self._start(stack, [entry], chunk=chunk)[entry] for chunk in self.sizes.chunks}
                samples: dict[int, list[dict[str, Any]]] = {chunk: [] for chunk in workers}
                for _ in range(self.sizes.pairs):
                    for chunk, worker in workers.items():
                        samples[chunk].append(worker("prefill", tokens=self.prompt[: entry.history]))
                self._save("chunk", [self._row(f"chunk {chunk}", entry, taken) for chunk, taken in samples.items()])

    def memory(self) -> None:
        """A fresh process each: the prompt, and what is generated after it."""
        settings = [(weights, budget) for weights in ("int4", "float32") for budget in self.sizes.budgets]
        entries = [
            entry for weights, budget in settings for entry in self._entries(weights, self.sizes.prefill, budget, 1)
        ]
        for entry in dict.fromkeys(entries):  # those that keep all rows have no budget
            with ExitStack() as stack:
                for worker in self._start(stack, [entry]).values():
                    worker("prefill", tokens=self.prompt[: entry.history])
                    self._save("memory", [self._series("memory", entry, worker, self.sizes.memory, 64)])

    def endless(self) -> None:
        """Far beyond the position limit, in constant memory, with counters that agree with arithmetic."""
        budget = self.sizes.endless_budget
        for entry in self._entries("int4", budget + INTERVAL, budget, 1):
            if entry.contestant != "keysieve":
                continue
            with ExitStack() as stack:
                for worker in self._start(stack, [entry]).values():
                    self._warm_up(worker, entry)  # over the first round
                    before = worker("counters")["tokens"]
                    row = self._series("endless", entry, worker, self.sizes.endless, 1000)
                    counters = worker("counters")
                    row["counters"] = {name: counters[name] for name in COUNTERS}
                    row["counters_exact"] = (
                        counters["tokens"] == before + self.sizes.endless
                        and counters["rows_held"] + counters["rows_evicted"] == counters["tokens"]
                        and counters["rows_evicted"] == counters["rounds"] * INTERVAL
                    )
                    self._save("endless", [row])

    def _series(self, workload: str, entry: Entry, worker: Worker, tokens: int, every: int) -> dict[str, Any]:
        """Decode in parts, and note speed and memory after each."""
        samples = [worker("decode", steps=min(every, tokens - done)) for done in range(0, tokens, every)]
        row = self._row(workload, entry, samples)
        row["series"] = [
            {
                "tokens": min(tokens, (number + 1) * every),
                "ms_cpu": row["samples_ms_cpu"][number],
                **{name: sample[name] for name in ("rss", "kv_bytes", "rows")},
            }
            for number, sample in enumerate(samples)
        ]
        row |= self.loading[entry]
        row["rss_drift"] = samples[-1]["rss"] / samples[0]["rss"] - 1
        return row

    def round(self) -> None:
        """One eviction round against one copy of K and V of the rows that it keeps."""
        for weights in ("int4", "float32"):
            for budget in self.sizes.budgets:
                for entry in self._entries(weights, budget + INTERVAL, budget, 1):
                    if entry.contestant == "keysieve":
                        with ExitStack() as stack:
                            for worker in self._start(stack, [entry]).values():
                                self._warm_up(worker, entry)
                                self._save("round", [self._round(entry, worker)])

    def _round(self, entry: Entry, worker: Worker) -> dict[str, Any]:
        turns = [(worker("decode", steps=INTERVAL), worker("copy", rows=entry.budget)) for _ in range(self.sizes.pairs)]
        row = self._decoded("round", entry, [decoded for decoded, _ in turns])
        row["copy_ms"] = 1e3 * statistics.median(copied["copy_wall_s"] for _, copied in turns)
        row["copy_ms_cpu"] = 1e3 * statistics.median(copied["copy_cpu_s"] for _, copied in turns)
        row["idle_us_cpu"] = worker("idle")["idle_us_cpu"]
        row["round_share"] = row["round_ms_cpu"] / (row["ms_cpu"] * INTERVAL)
        return row

    def fidelity(self) -> None:
        """Quantised weights and caches against float32, teacher-forced, without eviction: no KV row is ever lost."""
        from keysieve.compiler.compare import Fidelity, measure, read
        from keysieve.compiler.engine import load

        tokens = self.prompt[: self.sizes.fidelity]

        def dense(weights: str, kv_dtype: str) -> Any:
            bundle = SETUPS["keysieve"].model(weights, kv_dtype)
            return load(bundle, self.options.threads).session(dense=True, capacity=len(tokens))

        for weights, kv_dtype in QUANTISED:
            entry = Entry("keysieve-dense", "dense", weights, kv_dtype, len(tokens), None)
            if not self._wanted(entry):
                continue
            try:
                sessions, result = {"": dense(weights, kv_dtype)}, Fidelity()
            except SetupError as error:
                self._skip(entry, error)
                continue
            measure(read(dense("float32", "float32"), tokens), sessions, tokens, {"": result})
            row = {**self._blank("fidelity", entry), "kv_bytes": sessions[""].counters.kv_bytes, **result.summary()}
            print(f"fidelity {entry}: KL {row['kl']:.5f}, top-1 {100 * row['top1']:.1f} %", flush=True)
            self._save("fidelity", [row])

    # -- what they share -----------------------------------------------------------------------------------------
    def _entries(self, weights: str, history: int, budget: int, batch: int) -> list[Entry]:
        """All that take part in a comparison, keysieve first."""
        made = []
        for contestant, policy, given, kv_dtype in VARIANTS:
            if policy == "plain":
                entry = Entry(contestant, policy, given, kv_dtype, budget, None, batch)
            else:
                kept = None if policy in ALL_ROWS else budget
                entry = Entry(contestant, policy, given, kv_dtype, history, kept, batch)
            if given == weights and self._wanted(entry) and self._allowed(entry):
                made.append(entry)
        return made

    def _wanted(self, entry: Entry) -> bool:
        """Whether it was asked for by name, or does not take too long to be measured unasked."""
        given = self.options
        if given.weights and entry.weights not in given.weights:
            return False
        if entry.contestant.startswith("keysieve") and given.kv_dtype and entry.kv_dtype not in given.kv_dtype:
            return False
        if entry.batch > 1 and entry.contestant in ONE_SEQUENCE:
            return False
        if given.only:
            return entry.contestant in given.only
        if entry.batch > 1 and entry.contestant in WIDE:
            return False
        return not (entry.history > 8192 and entry.contestant in LONG)

    def _allowed(self, entry: Entry) -> bool:
        """Whether the model's positions suffice, or the user said that they need not."""
        allowed = entry.history <= self.limit or self.options.ignore_position_limit
        if not allowed:
            print(
                f"{entry}: {entry.history} tokens, made for {self.limit}; give --ignore-position-limit", file=sys.stderr
            )
        return allowed

    def _start(self, stack: ExitStack, entries: Iterable[Entry], **more: Any) -> dict[Entry, Worker]:
        """A loaded worker for each that can run here. more: further fields of its command to load."""
        workers: dict[Entry, Worker] = {}
        for entry in entries:
            if entry.contestant == "official" and self.options.official is None:
                self._skip(entry, SetupError("not given (--official DIR)"))
                continue
            setup = SETUPS[entry.contestant]
            try:
                python = python_of(entry.contestant, setup)
                model = setup.model(entry.weights, entry.kv_dtype)
                log = WORK / f"{entry.contestant}.log"
                workers[entry] = stack.enter_context(Worker(setup.module, python, self.options.threads, log))
                setting = {
                    **asdict(entry),
                    "model": str(model),
                    "threads": self.options.threads,
                    "interval": INTERVAL,
                    "longest": entry.history + (self.sizes.pairs + 1) * INTERVAL + self.sizes.memory,
                    **more,
                }
                if entry.contestant == "official":
                    setting |= {"folder": str(self.options.official), "statistics": str(OFFICIAL_STATISTICS)}
                loaded = workers[entry]("load", **setting)
                self.versions[entry.contestant] = loaded["versions"]
                self.loading[entry] = {"load_s": loaded["wall_s"], "loaded_rss": loaded["rss"]}
            except (SetupError, WorkerError) as error:
                workers.pop(entry, None)
                self._skip(entry, error)
        return workers

    def _guarded(self, workers: dict[Entry, Worker], entry: Entry, work: Any) -> None:
        try:
            work()
        except WorkerError as error:
            del workers[entry]
            self._skip(entry, error)

    def _skip(self, entry: Entry, error: KeySieveError) -> None:
        print(f"{entry}: skipped: {error}", file=sys.stderr, flush=True)
        self.versions.setdefault(entry.contestant, f"not run: {error}")

    def _blank(self, workload: str, entry: Entry) -> dict[str, Any]:
        return {"workload": workload, **asdict(entry), "threads": self.options.threads, "revision": self.revision}

    def _row(self, workload: str, entry: Entry, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Medians over samples: each of some decoded tokens, or of the whole prompt."""

        def milliseconds(clock: str) -> list[float]:
            return [1e3 * sample[clock] / len(sample.get("tokens", range(entry.history))) for sample in samples]

        row = {
            **self._blank(workload, entry),
            "ms_per_token": statistics.median(milliseconds("wall_s")),
            "ms_cpu": statistics.median(milliseconds("cpu_s")),
            "kv_bytes": samples[-1]["kv_bytes"],
            "peak_rss": samples[-1]["peak_rss"],
            "rows_held": samples[-1]["rows"],
            "samples_ms_cpu": milliseconds("cpu_s"),
        }
        print(
            f"{workload:8} {entry.history:6} {entry.budget or 'all':>5} x{entry.batch}  {entry!s:42} "
            f"{row['ms_per_token']:8.2f} ms  {row['ms_cpu']:8.2f} ms CPU  KV {row['kv_bytes'] / 1e6:7.1f} MB  "
            f"peak {row['peak_rss'] / 1e6:7.1f} MB  rows {row['rows_held']}",
            flush=True,
        )
        return row

    def _save(self, workload: str, rows: list[dict[str, Any]], samples: dict[Entry, Any] | None = None) -> None:
        """Merge into the file; ratios are those of every keysieve entry and all that took turns with it."""
        result = _read(self.output)
        result["versions"] |= self.versions
        result["rows"] = merged(result["rows"], rows)
        made = (
            compare(workload, one, other, samples)
            for one in samples or {}
            for other in samples or {}
            if one.contestant == "keysieve" and (other.contestant != "keysieve" or other.history < one.history)
        )
        result["ratios"] |= {name: {**found, "revision": self.revision} for name, found in made}
        write_atomically(self.output, json.dumps(result, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    """What was measured before. Raises KeySieveError for measurements of another machine."""
    machine = _machine()
    if not file.is_file():
        return {"machine": machine, "versions": {}, "rows": [], "ratios": {}}
    result: dict[str, Any] = json.loads(file.read_text())
    if result["machine"] != machine:
        raise KeySieveError(f"{file} was measured on {result['machine']}, this is {machine}; move it away first")
    return result


def _revision() -> str:
    """The last commit that changed the engine, and a + if something changed since."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *ENGINE]
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            raise KeySieveError(f"results name the commit that they are of, and git cannot tell it: {error}") from error

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


def _machine() -> dict[str, Any]:
    lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {name.strip(): value.strip() for name, value in lines.items()}
    sets = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": info.get("model name", platform.machine()),
        "instructions": [name for name in sets if name in info.get("flags", "").split()],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _prompt_tokens(count: int) -> list[int]:
    """The first tokens of Python's reference topics, an English text."""
    from transformers import AutoTokenizer

    from keysieve.compiler.text import iter_texts, token_chunks

    def chunks() -> Iterator[list[int]]:
        yield from token_chunks(iter_texts(None), AutoTokenizer.from_pretrained(MODEL), INTERVAL, count)

    tokens = list(islice((token for chunk in chunks() for token in chunk), count))
    if len(tokens) < count:
        raise KeySieveError(f"the text has {len(tokens)} tokens, {count} are needed")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    workloads = ("decode", "length", "prefill", "chunk", "memory", "round", "fidelity")

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser.add_argument("--workloads", type=names, default=list(workloads), help=f"of {', '.join(workloads)}")
    parser.add_argument("--only", type=names, help=f"of {', '.join(SETUPS)} (default: all but what takes very long)")
    parser.add_argument("--weights", type=names, help="of int4, float32; int8 too for fidelity")
    parser.add_argument("--kv-dtype", type=names, help="of keysieve's caches: float32, float16")
    parser.add_argument("--history", type=numbers, help="prompt tokens (default 2048,8192,32768)")
    parser.add_argument("--budgets", type=numbers, help="rows kept (default 512,1024,2048)")
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="sequences (default 1,8)")
    parser.add_argument("--pairs", type=int, help="turns of a comparison (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--official", type=Path, metavar="DIR", help="a checkout of the paper's code")
    parser.add_argument("--ignore-position-limit", action="store_true", help="run beyond the model's positions, too")
    parser.add_argument("--endless", action="store_true", help="also 100,000 tokens at budget 1024, beyond the limit")
    parser.add_argument("--quick", action="store_true", help="show that everything runs; measures nothing of worth")
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks.md anew, and run nothing")
    options = parser.parse_args()
    if options.report:
        write_report(json.loads(RESULT.read_text()))
        return
    unknown = {*options.workloads} - {*workloads, "endless"} | {*(options.only or [])} - {*SETUPS}
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    sizes = Sizes.quick() if options.quick else Sizes()
    for name, given in (("histories", options.history), ("budgets", options.budgets), ("pairs", options.pairs)):
        if given is not None:
            setattr(sizes, name, given)
    WORK.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(options, sizes, QUICK if options.quick else RESULT)
    benchmark.versions["driver"] = {"keysieve": version("keysieve"), "python": platform.python_version()}
    for workload in dict.fromkeys([*options.workloads, *(["endless"] if options.endless else [])]):
        getattr(benchmark, workload)()
    if not options.quick:
        write_report(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
