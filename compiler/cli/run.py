"""keysieve run DIR --prompt TEXT: generate with a bundle; the text comes as it is made."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keysieve.compiler.cli.arguments import (
    ENGINE,
    add_engine_options,
    given,
    natural,
    output_file,
    positive,
    prompt_text,
)
from keysieve.compiler.cli.terminal import (
    UsageError,
    human_bytes,
    quiet_transformers,
    show,
    show_json,
    table,
    usage_errors,
    write_result,
)
from keysieve.errors import EngineError

if TYPE_CHECKING:
    from keysieve.compiler.engine import Engine

MAX_NEW_TOKENS = 128


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="a bundle folder of `keysieve compile`")
    parser.add_argument(
        "--prompt", metavar="TEXT|@FILE|-", required=True, help="the text, a file that holds it, or - for stdin"
    )
    parser.add_argument("--raw", action="store_true", help="feed the text as it is, not through the chat template")
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=positive,
        default=MAX_NEW_TOKENS,
        help=f"tokens to generate at most (default {MAX_NEW_TOKENS})",
    )
    drawn = parser.add_argument_group("how tokens are drawn")
    drawn.add_argument("--temperature", metavar="T", type=float, help="0 takes the likeliest token (default 0)")
    drawn.add_argument("--top-p", metavar="P", type=float, help="from the likeliest tokens of mass P (default 1: all)")
    drawn.add_argument("--top-k", metavar="K", type=natural, help="from the K likeliest tokens (default 0: all)")
    drawn.add_argument("--seed", metavar="N", type=natural, help="the same seed draws the same tokens")
    memory = parser.add_argument_group("memory and speed")
    memory.add_argument("--budget", metavar="N", type=positive, help="rows kept (default: the bundle's)")
    memory.add_argument("--capacity", metavar="N", type=positive, help="rows allocated (default: what is needed)")
    memory.add_argument(
        "--chunk",
        metavar="N",
        type=positive,
        help="prompt tokens a step (default: the interval; on a GPU with torch 512 of all sequences)",
    )
    add_engine_options(memory)
    memory.add_argument(
        "--ignore-position-limit", action="store_true", help="go past the longest text the model was made for"
    )
    parser.add_argument("--stats", action="store_true", help="print speed and memory on stderr afterwards")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    parser.add_argument(
        "--kept",
        metavar="FILE",
        type=Path,
        help="write a page (.html) that shows which tokens the caches hold in the end, for engines with gates",
    )


def run(args: Namespace) -> int:
    text = prompt_text(args.prompt)
    page = args.kept and output_file(args.kept, "--kept")
    sampling = given(args, "temperature", "top_p", "top_k", "seed")
    with usage_errors():
        from keysieve.compiler.sampling import Sampling

        Sampling(**sampling)
    from keysieve.compiler.engine import load

    quiet_transformers()
    engine = load(args.bundle, **given(args, *ENGINE))
    if page and not engine.manifest["row_states"]:
        raise UsageError(
            f"--kept: {args.bundle} does not keep which tokens its rows are of, as engines with gates do; leave it out"
        )
    options = {
        "chat": not args.raw and bool(getattr(engine.tokenizer, "chat_template", None)),
        "ignore_position_limit": args.ignore_position_limit,
        **sampling,
        **given(args, "max_new_tokens", "budget", "capacity", "chunk"),
    }
    ids = engine.encode(text, options["chat"]) if page else []  # the page shows them
    prompt = ids if page else text
    if args.json:
        (result,) = engine.generate(prompt, **options)
        tokens, numbers = result.tokens, measured(engine, len(result.tokens))
        show_json({"text": result.text, "token_ids": result.tokens, "reason": result.reason, **numbers})
    else:
        tokens = _stream(engine, prompt, options)
        numbers = measured(engine, len(tokens))
    if page:
        _write_kept(page, engine, ids, tokens)
    if args.stats:
        print(_stats(numbers), file=sys.stderr)
    return 0


def _write_kept(page: Path, engine: "Engine", prompt: list[int], tokens: list[int]) -> None:
    """Which tokens of prompt and text are held in the end; the last one was drawn and not yet read."""
    from keysieve.compiler.kept_tokens import kept_page

    counters = engine.counters
    if counters is None:
        raise EngineError("the engine generated nothing, so there is nothing to show")
    (holders,) = counters.holders
    read = [*prompt, *tokens][: len(holders)]
    text = kept_page(engine.bundle.path.name, engine.tokenizer, read, len(prompt), holders, counters.heads)
    write_result(page, text, "--kept")


def _stream(engine: "Engine", prompt: str | list[int], options: dict[str, Any]) -> list[int]:
    """Print the text as it comes; returns the new tokens, without the one that stopped it."""
    stops, tokens = set(engine.manifest.get("stop_tokens", [])), []
    steps = engine.stream(prompt, **options)  # a request that cannot be served raises here
    try:
        for step in steps:
            tokens += [token for token in step.tokens if token is not None and token not in stops]
            sys.stdout.write(step.texts[0])
            sys.stdout.flush()
    finally:
        show("")  # so that an interrupt's message has its own line
    return tokens


def measured(engine: "Engine", tokens: int) -> dict[str, Any]:
    """What the last request took: `tokens` new ones, speed, rows and bytes of its one sequence."""
    timing, counters = engine.timing, engine.counters
    if counters is None:
        raise EngineError("the engine generated nothing, so there is nothing to report")
    return {
        "tokens": tokens,
        "tokens_per_s": timing.tokens_per_s,
        "prompt_tokens": timing.prompt_tokens,
        "prompt_seconds": timing.prompt_seconds,
        "rounds": counters.rounds[0],
        "rows_held": counters.rows_held[0],
        "rows_evicted": counters.rows_evicted[0],
        "kv_bytes": counters.kv_bytes,
        "capacity": counters.capacity,
        **({"forgotten": counters.forgotten[0]} if counters.forgotten else {}),
    }


def _stats(numbers: dict[str, Any]) -> str:
    rows = [
        ("tokens", f"{numbers['tokens']:,}", f"{numbers['tokens_per_s']:.1f} tokens/s"),
        ("prompt tokens", f"{numbers['prompt_tokens']:,}", f"{numbers['prompt_seconds']:.2f} s"),
        ("rounds", f"{numbers['rounds']:,}", ""),
        ("rows held", f"{numbers['rows_held']:,}", f"capacity {numbers['capacity']:,}"),
        ("rows evicted", f"{numbers['rows_evicted']:,}", ""),
        *(
            [("forgotten", f"{numbers['forgotten']:.1%}", "of the tokens, by all heads")]
            if "forgotten" in numbers
            else []
        ),
        ("KV bytes", human_bytes(numbers["kv_bytes"]), ""),
    ]
    return table(rows, right=[1])
