"""Check and measure everything that needs an NVIDIA GPU, on a machine that has one and little else.

    python3 benchmarks/gpu/run.py [-o FOLDER] [--only STAGE,...]

Needs Python 3.11, torch 2.11 or newer with Triton, transformers, pytest; nothing of keysieve is installed: its folders
are laid out as the package by links. What pack.py made lies in build/gpu. Every stage is a process of its own with a
limit of seconds, and all together have one. Results are written at once to FOLDER/results.jsonl, and all of them to
FOLDER/gpu.json at the end. A stage that fails is a result, and the others go on. page.py makes docs/gpu.md of them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = ("compiler", "export", "kernels", "passes", "plugins")

KERNEL_TESTS = "tests/kernels/triton"
AT_ONCE = ("-p", "no:cacheprovider", *(("-n", "6") if find_spec("xdist") else ()))


@dataclass(frozen=True)
class Stage:
    """A process: a module of gpu.stages with options of its `run`, or another command; and what it may take."""

    name: str
    seconds: int
    module: str = ""
    options: tuple[str, ...] = ()
    under: tuple[str, ...] = ()  # a tool that runs it
    prepares: bool = False  # starts with the first ones, and waits for its turn before it measures
    command: tuple[str, ...] = ()


def sanitizer(tool: str) -> tuple[str, ...]:
    return ("compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=score|select|update", "--error-exitcode", "9")


# Side by side, since none of them is timed; then one after the other, in the order of their value.
TOGETHER = (
    Stage("tokens", 150, "tokens"),
    Stage("plugin", 100, "plugin"),
    Stage("kernels", 150, command=("-m", "pytest", "-q", "-m", "gpu", *AT_ONCE, KERNEL_TESTS)),
    Stage("memcheck", 120, "plugin", ("only=small",), sanitizer("memcheck")),
    Stage("racecheck", 120, "plugin", ("only=small",), sanitizer("racecheck")),
)
IN_TURN = (
    Stage("environment", 40, "environment"),
    Stage("attention", 60, "attention"),
    Stage("rounds", 60, "rounds"),
    Stage("decoding compiled", 300, "decoding", ("compiled=yes",), prepares=True),
    Stage("decoding", 150, "decoding"),
    Stage("prompts", 60, "prompts"),
    Stage("huggingface", 90, "huggingface"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "build" / "gpu-results", help="of results")
    parser.add_argument("--built", type=Path, default=REPOSITORY / "build" / "gpu", help="what pack.py made")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the logic, with tiny sizes")
    parser.add_argument("--limit", type=int, default=470, help="seconds for all stages (default 470)")
    parser.add_argument("--only", help="stages, separated by commas")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--option", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        run_stage(options)
        return
    if options.device == "cuda" and not has_gpu():
        sys.exit("no NVIDIA GPU that torch can use; --device cpu tries the logic, with tiny sizes")
    wanted = set(options.only.split(",")) if options.only is not None else None
    unknown = (wanted or set()) - {stage.name for stage in (*TOGETHER, *IN_TURN)}
    if unknown:
        parser.error(f"no stage {', '.join(map(repr, sorted(unknown)))}")
    options.output, options.built = options.output.resolve(), options.built.resolve()  # stages run elsewhere
    options.output.mkdir(parents=True, exist_ok=True)
    for old in (*options.output.glob("*.turn"), *options.output.glob("*.log"), options.output / "results.jsonl"):
        old.unlink(missing_ok=True)  # of an earlier run
    if not options.built.is_dir():
        print(
            f"{options.built} is not there, so stages that need it will fail: make gpu-pack makes it", file=sys.stderr
        )
    site = lay_out(options.output / "site")
    started, ended = time.time(), {}
    together = [stage for stage in TOGETHER if wanted is None or stage.name in wanted]
    running = [(stage, start(stage, options, site)) for stage in together]
    early = [stage for stage in IN_TURN if stage.prepares and (wanted is None or stage.name in wanted)]
    prepared = {stage.name: start(stage, options, site) for stage in early}
    for stage, process in running:
        ended[stage.name] = finish(stage, process, started + options.limit)
    for stage in IN_TURN:
        if wanted is None or stage.name in wanted:
            if time.time() < started + options.limit:
                turn_of(stage, options.output).touch()
                process = prepared.get(stage.name) or start(stage, options, site)
                ended[stage.name] = finish(stage, process, started + options.limit)
            else:
                if stage.name in prepared:
                    prepared[stage.name][0].kill()
                    prepared[stage.name][0].wait()
                ended[stage.name] = {"code": None, "seconds": 0, "log": ["no time was left"]}
    collect(options.output, ended, time.time() - started)


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no torch; name a Python that has it: make gpu PYTHON=...")
    return torch.cuda.is_available()


def run_stage(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from gpu.place import open_place

    given = dict(option.split("=", 1) for option in options.option)
    given = {name: True if value == "yes" else value for name, value in given.items()}
    import_module(f"gpu.stages.{options.stage}").run(open_place(options.device, options.output, options.built), **given)


def lay_out(site: Path) -> Path:
    """keysieve as a package, by links."""
    package = site / "keysieve"
    package.mkdir(parents=True, exist_ok=True)
    for source in [*(REPOSITORY / "src" / "keysieve").glob("*.py"), *(REPOSITORY / room for room in ROOMS)]:
        link = package / source.name
        if not link.exists():
            link.symlink_to(source)
    return site


def start(stage: Stage, options: argparse.Namespace, site: Path) -> tuple["subprocess.Popen[bytes]", float]:
    itself = [str(Path(__file__)), "--stage", stage.module, "--device", options.device]
    itself += ["-o", str(options.output), "--built", str(options.built)]
    turn = [f"turn={turn_of(stage, options.output)}"] if stage.prepares else []
    for option in [*stage.options, *turn]:
        itself += ["--option", option]
    command = [*stage.under, sys.executable, *(stage.command or itself)]
    paths = [str(site), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} | ({"TRITON_INTERPRET": "1"} if options.device == "cpu" else {})
    with (options.output / f"{stage.name}.log").open("wb") as log:
        try:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
        except FileNotFoundError:
            process = subprocess.Popen(["false"])  # the tool that it runs under is not there
    return process, time.time()


def turn_of(stage: Stage, output: Path) -> Path:
    """The file that appears when it is the stage's turn."""
    return output / f"{stage.name}.turn"


def finish(stage: Stage, started: tuple["subprocess.Popen[bytes]", float], latest: float) -> dict[str, object]:
    """Wait for a stage, until its own seconds are over or the latest time of all has come."""
    process, began = started
    try:
        code = process.wait(max(1.0, min(began + stage.seconds, latest) - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = 124
    print(f"{stage.name}: {'done' if code == 0 else f'ended with {code}'}, {time.time() - began:.0f} s", flush=True)
    return {"code": code, "seconds": round(time.time() - began, 1)}


def collect(output: Path, ended: dict[str, dict[str, object]], seconds: float) -> None:
    """All results as one file, with the last lines of the logs of stages that print no results."""
    results = output / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for name, end in ended.items():
        if "log" in end:
            continue
        log = (output / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if end["code"] or name in ("kernels", "memcheck", "racecheck"):
            end["log"] = log[-3 if not end["code"] else -12 :]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    content = {
        "commit": commit.stdout.strip() or None,
        "seconds": round(seconds),
        "stages": ended,
        "results": [json.loads(line) for line in lines],
    }
    (output / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
