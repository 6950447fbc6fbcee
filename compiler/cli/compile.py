"""keysieve compile MODEL -o DIR: a bundle with an engine that evicts its own cache."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from keysieve.compiler.cli.arguments import add_library_options, add_quiet, given, natural, positive, progress_of
from keysieve.compiler.cli.describe import report_rows
from keysieve.compiler.cli.terminal import UsageError, human_bytes, quiet_transformers, show, table, usage_errors
from keysieve.compiler.config import (
    CENTRES,
    DTYPES,
    HEADS,
    ON_TENSORRT,
    POLICIES,
    PROMPTS,
    TARGETS,
    TERMS,
    WEIGHTS,
    CompileConfig,
    EvictionConfig,
    PolicyConfig,
    TensorRTConfig,
)
from keysieve.kernels import SCOPES

if TYPE_CHECKING:
    from keysieve.compiler.inspect import Report

# Options of the series in the distance: keyword of PolicyConfig -> option.
TRIGONOMETRIC = {
    "centres": "--centres",
    "aggregation": "--aggregation",
    "offset_max": "--offset-max",
    "trig": "--no-trig",
    "norm": "--no-norm",
}

# Options that only TensorRT targets have: keyword of TensorRTConfig -> option.
TENSORRT = {
    "architectures": "--arch",
    "batch": "--max-batch",
    "chunk": "--max-chunk",
    "capacity": "--max-capacity",
    "aliased": "--aliased",
    "include": "--tensorrt-include",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a hub name, a folder with config.json, or a .gguf file")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="the bundle folder to make (needed unless --dry-run)"
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--policy", choices=POLICIES, help=f"how keys are rated (default {PolicyConfig.name})")
    kept.add_argument("--budget", metavar="N", type=positive, help=f"rows kept (default {EvictionConfig.budget})")
    kept.add_argument(
        "--interval",
        metavar="N",
        type=positive,
        help=f"rows beyond the budget at which it evicts (default {EvictionConfig.interval})",
    )
    kept.add_argument(
        "--sinks", metavar="N", type=natural, help=f"first rows, always kept (default {EvictionConfig.sinks})"
    )
    kept.add_argument(
        "--recent", metavar="N", type=natural, help=f"last rows, always kept (default {EvictionConfig.recent})"
    )
    kept.add_argument(
        "--scope", choices=SCOPES, help=f"what shares one choice of rows (default {EvictionConfig.scope})"
    )
    kept.add_argument("--prompt", choices=PROMPTS, help=f"pinned: never evicted (default {EvictionConfig.prompt})")
    kept.add_argument(
        "--heads",
        choices=HEADS,
        help="classes: each KV head gets rows by its share in the statistics, the budget on average (default uniform, "
        "for sieve classes)",
    )
    kept.add_argument(
        "--head-classes",
        metavar="N",
        type=positive,
        help=f"how many budgets there are for heads, at most (default {EvictionConfig.head_classes})",
    )
    kept.add_argument("--stats", metavar="FILE", type=Path, help="statistics of `keysieve calibrate`")
    kept.add_argument(
        "--terms",
        metavar="TERM,...",
        type=lambda value: tuple(value.split(",")),
        help=f"of the sum by which sieve rates keys (default {','.join(TERMS)})",
    )
    score = parser.add_argument_group("policies triattention and sieve")
    score.add_argument(
        "--centres",
        choices=CENTRES,
        help="online: measured while it runs, no statistics needed (default calibrated, for sieve online)",
    )
    score.add_argument(
        "--offset-max",
        metavar="N",
        type=positive,
        help=f"farthest future distance, a power of two (default {PolicyConfig.offset_max})",
    )
    score.add_argument(
        "--aggregation", choices=("mean", "max"), help=f"over the distances (default {PolicyConfig.aggregation})"
    )
    score.add_argument("--no-trig", dest="trig", action="store_false", default=None, help="leave out the first term")
    score.add_argument("--no-norm", dest="norm", action="store_false", default=None, help="leave out the second term")
    made = parser.add_argument_group("what is made")
    made.add_argument("--dtype", choices=DTYPES, help=f"of weights and cache (default {CompileConfig.dtype})")
    made.add_argument(
        "--weights", choices=WEIGHTS, help="integers in place of the weights, for ONNX Runtime (default: as --dtype)"
    )
    made.add_argument("--kv-dtype", choices=DTYPES, help="of the cache alone, for ONNX Runtime (default: as --dtype)")
    made.add_argument("--inline", action="store_true", help="only standard ONNX operators, for other runtimes")
    made.add_argument("--dump-graphs", metavar="DIR", type=Path, help="write the graphs as text, before and after")
    made.add_argument("--dry-run", action="store_true", help="do all of it without weights, and write no bundle")
    engine = parser.add_argument_group("TensorRT")
    engine.add_argument(
        "--target",
        choices=TARGETS,
        help="torch: a GPU or a CPU, with Triton's kernels; tensorrt: ONNX Runtime and TensorRT "
        f"(default {CompileConfig.target})",
    )
    engine.add_argument(
        "--max-batch", dest="batch", metavar="N", type=positive, help=f"sequences (default {TensorRTConfig.batch})"
    )
    engine.add_argument(
        "--max-chunk", dest="chunk", metavar="N", type=positive, help=f"tokens a step (default {TensorRTConfig.chunk})"
    )
    engine.add_argument(
        "--max-capacity",
        dest="capacity",
        metavar="N",
        type=positive,
        help="rows of a cache (default: what budget, interval and chunk need)",
    )
    add_library_options(engine)
    add_quiet(parser)


def run(args: Namespace) -> int:
    with usage_errors():
        config = compile_config(args)
    if args.output is None and not args.dry_run:
        raise UsageError("where should the bundle go? give -o DIR (or --dry-run, which writes none)")
    from keysieve.compiler.compile import compile

    quiet_transformers()
    output = args.output or Path()
    report = compile(args.model, output, config, progress=progress_of(args), dry_run=args.dry_run)
    show(_summary(args, report))
    return 0


def compile_config(args: Namespace) -> CompileConfig:
    """The config objects behind the options. Raises ConfigError for options that do not go together."""
    policy = given(args, *TRIGONOMETRIC, "terms")
    name = args.policy or PolicyConfig.name
    if "terms" in policy and name != "sieve":
        raise UsageError(f"policy {name} has no --terms; leave it out, or use --policy sieve")
    foreign = [option for keyword, option in TRIGONOMETRIC.items() if keyword in policy]
    if foreign and not PolicyConfig(name, terms=policy.get("terms", TERMS)).trigonometric:
        raise UsageError(f"policy {name} does not use {', '.join(foreign)}; leave it out, or use triattention")
    kept = given(args, "budget", "interval", "sinks", "recent", "scope", "prompt", "heads", "head_classes")
    if "head_classes" in kept and name == "sieve":
        kept.setdefault("heads", "classes")
    eviction = EvictionConfig(PolicyConfig(name, **policy), **kept)
    if args.head_classes is not None and eviction.heads != "classes":
        raise UsageError("--head-classes says how many classes --heads classes makes; add that, or leave it out")
    made = given(args, "dtype", "weights", "kv_dtype", "stats", "inline", "dump_graphs", "target")
    engine = given(args, *TENSORRT)
    if engine and made.get("target", CompileConfig.target) not in ON_TENSORRT:
        foreign = [TENSORRT[keyword] for keyword in engine]
        raise UsageError(f"{', '.join(foreign)} is for TensorRT targets; add --target tensorrt-rtx or tensorrt")
    if engine:
        made["tensorrt"] = TensorRTConfig(**engine)
    return CompileConfig(eviction, **made)


def _summary(args: Namespace, report: "Report") -> str:
    again = f"keysieve compile {quote(args.model)} -o DIR ..."
    if args.dry_run:
        head, following = [("bundle", "none: a dry run writes nothing")], again
    else:
        size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
        head = [("bundle", f"{args.output} ({human_bytes(size)})")]
        following = f"keysieve run {quote(str(args.output))} --prompt 'Once upon a time' --stats"
    matched = sum(layer.matched for layer in report.layers)
    rows = [*head, ("layers", f"{matched} of {len(report.layers)} matched"), *report_rows(report)]
    return f"{table(rows)}\nnext: {following}"
