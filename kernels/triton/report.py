"""Write the tables of docs/kernels.md: `python -m keysieve.kernels.triton.report docs/kernels.md`.

Everything in them is counted or reported by the assembler; nothing is measured, since no GPU takes part.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from keysieve.kernels.triton import attend_variant
from keysieve.kernels.triton.aot import ARCHITECTURES, PORTABLE, Artifact, build, build_variant
from keysieve.kernels.triton.configuration import ATTEND_REGISTERS, MAX_REGISTERS, KernelConfiguration
from keysieve.kernels.triton.traffic import Round, attention, held, minimum, traffic

MODELS = {
    "36 layers, 32 query and 8 KV heads, D 128, bfloat16": KernelConfiguration(
        layers=36, query_heads=32, kv_heads=8, head_dim=128, value_dim=128, rotary_dim=128, dtype="bfloat16"
    ),
    "SmolLM2-135M: 30 layers, 9 query and 3 KV heads, D 64, float16": KernelConfiguration(
        layers=30, query_heads=9, kv_heads=3, head_dim=64, value_dim=64, rotary_dim=64, dtype="float16"
    ),
}
MAX_SHARED = 48 * 1024  # bytes; more would need an attribute set before the launch
# The attention is launched by Triton, which sets that attribute. It keeps tiles of keys and values on their way in
# shared memory, as much as a block may have on the GPUs of 8.6, 8.9 and 12.0.
ATTEND_SHARED = 99 * 1024
# Warps, blocks and KB of shared memory of an SM (CUDA programming guide, table of compute capabilities).
SM = {
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
PROCESSORS = 132  # of an H100, for which the attention's tables are
ATTEND_ARCHITECTURES = (80, 90)
REGISTERS = 65536  # of an SM, given to warps in units of 256
BANDWIDTH = 3.35e12  # bytes per second: the memory of an H100 SXM as its data sheet has it
PARAMETERS = 8.2e9  # of the model of the traffic tables, such as Qwen3-8B
# 2,176 rows held, 2,048 kept; the 4 sinks stay where they are and, at worst, every other row moves.
ROUND = Round(rows=2176, budget=2048, moved=2044, capacity=2304)


def limits_broken(artifact: Artifact) -> list[str]:
    """What a kernel uses that it must not."""
    attends = artifact.name == "attend"
    broken = {
        f"{artifact.stack} bytes of stack": artifact.stack > 0,
        f"{artifact.spills} bytes of spills": artifact.spills > 0,
        f"{artifact.registers} registers": artifact.registers > (ATTEND_REGISTERS if attends else MAX_REGISTERS),
        f"{artifact.shared} bytes of shared memory": artifact.shared > (ATTEND_SHARED if attends else MAX_SHARED),
    }
    return [f"{artifact.name} for sm_{artifact.arch} uses {what}" for what, holds in broken.items() if holds]


def occupancy(artifact: Artifact) -> float:
    """Warps that fit on an SM at once, as a share of what it can hold."""
    warps, blocks, shared = SM[artifact.arch]
    per_warp = -(-artifact.registers * 32 // 256) * 256
    fitting = min(
        blocks,
        warps // artifact.num_warps,
        REGISTERS // (per_warp * artifact.num_warps),
        shared * 1024 // (artifact.shared + 1024),  # each block has 1 KB of its own
    )
    return fitting * artifact.num_warps / warps


def resources(artifacts: Iterable[Artifact]) -> str:
    """The table of registers, stack, spills, shared memory, occupancy, PTX version and code size."""
    header = ("kernel", "sm", "registers", "stack", "spills", "shared", "threads", "occupancy", "PTX", "cubin")
    rows = [
        (
            artifact.name,
            artifact.arch,
            artifact.registers,
            artifact.stack,
            artifact.spills,
            artifact.shared,
            32 * artifact.num_warps,
            f"{100 * occupancy(artifact):.0f} %",
            artifact.ptx_version + (f", {len(artifact.ptx)} B" if artifact.arch == PORTABLE else ""),
            f"{len(artifact.cubin)} B",
        )
        for artifact in sorted(artifacts, key=lambda artifact: artifact.name)
    ]
    return _table(header, rows)


def round_bytes(model: KernelConfiguration, work: Round = ROUND) -> str:
    """The table of bytes of one round, its share above the minimum and the bound in time."""
    kernels = traffic(model, work)
    rows = [(one.name, one.launches, _mega(one.read), _mega(one.written)) for one in kernels]
    rows.append(
        (
            "**all**",
            sum(one.launches for one in kernels),
            _mega(sum(one.read for one in kernels)),
            _mega(sum(one.written for one in kernels)),
        )
    )
    moved = sum(one.read + one.written for one in kernels)
    least = minimum(model, work)
    cache = 2 * model.layers * model.kv_heads * work.rows * model.head_dim * 2
    step = (2 * PARAMETERS + cache) / BANDWIDTH
    per_step = moved / BANDWIDTH / (work.rows - work.budget)
    text = [
        _table(("kernel", "launches", "MB read", "MB written"), rows),
        "",
        f"* Minimum (each key read once, each moved row read and written once): {_mega(least)} MB. "
        f"The kernels move {_mega(moved)} MB, **{moved / least:.3f} times** that.",
        f"* Bound, not a measurement: at 3.35 TB/s the minimum takes at least {1e6 * least / BANDWIDTH:.0f} us "
        f"and the kernels' bytes at least {1e6 * moved / BANDWIDTH:.0f} us.",
        f"* Bound, not a measurement: a decode step that reads {PARAMETERS / 1e9:.1f} billion bfloat16 weights and "
        f"{work.rows} rows of cache takes at least {1e3 * step:.2f} ms at that bandwidth. A round every "
        f"{work.rows - work.budget} steps adds {1e6 * per_step:.2f} us of traffic to each, "
        f"{100 * per_step / step:.2f} % of the step.",
        f"* Launches of an idle step: {model.layers} appends (one update per layer, which every step needs), and one "
        f"each of {' and '.join(one.name for one in kernels[:-1])}, whose programs leave at once where nothing is "
        "due. A step that evicts has the same launches.",
    ]
    return "\n".join(text)


def attention_bytes(model: KernelConfiguration) -> str:
    """The table of bytes that the attention of one layer moves while decoding, and of its programs."""
    header = (
        "sequences",
        "rows",
        "programs",
        "of them share",
        "MB of keys and values",
        "MB read",
        "MB written",
        "read",
    )
    rows = []
    for batch, count in ((1, 2176), (8, 2176), (32, 2176), (1, 32768), (8, 32768)):
        capacity = count + 128
        sizes = (model.query_heads, model.kv_heads, model.head_dim, model.value_dim, model.dtype)
        work = attend_variant.attend(batch, 1, capacity, *sizes, PROCESSORS)
        moved, least = attention(model, batch, count, capacity, PROCESSORS), held(model, batch, count)
        programs = work.variant.grid.of(batch, capacity)[0]
        times = f"{moved.read / least:.3f} times"
        bytes_ = map(_mega, (least, moved.read, moved.written))
        rows.append((batch, count, programs, attend_variant.shares(work, count), *bytes_, times))
    return _table(header, rows)


def attention_resources(model: KernelConfiguration, cache: Path | None = None) -> str:
    """`resources` of the attention: of one token and of 512, by one program and by several."""
    sizes = (model.query_heads, model.kv_heads, model.head_dim, model.value_dim, model.dtype)
    lines = []
    for title, batch, tokens in (
        ("one token of 8 sequences, 4 programs for a tile of queries", 8, 1),
        ("one token of 32 sequences", 32, 1),
        ("64 tokens, 5 programs for a tile of queries", 1, 64),
        ("512 tokens", 1, 512),
    ):
        work = attend_variant.attend(batch, tokens, 2304, *sizes, PROCESSORS)
        built = [build_variant(work.variant, arch, cache) for arch in ATTEND_ARCHITECTURES]
        lines.append(f"{title}:\n\n{resources(built)}")
    return "\n\n".join(lines)


def sections(cache: Path | None = None) -> dict[str, str]:
    """The generated sections of the document, by the name in their markers."""
    found = {"round": round_bytes(next(iter(MODELS.values())))}
    for number, (title, model) in enumerate(MODELS.items(), 1):
        found[f"resources {number}"] = f"{title}:\n\n{resources(build(model, ARCHITECTURES, cache))}"
    model = next(iter(MODELS.values()))
    found["attention"] = attention_bytes(model)
    found["resources attention"] = attention_resources(model, cache)
    return found


def filled(document: str, cache: Path | None = None) -> str:
    """The document with every generated section written anew. Raises ValueError where a marker is missing."""
    for name, section in sections(cache).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if document.count(begin) != 1 or document.count(end) != 1:
            raise ValueError(f"the document needs the lines {begin.strip()} and {end} exactly once")
        before, rest = document.split(begin)
        document = before + begin + section + "\n" + end + rest.split(end)[1]
    return document


def _mega(number: float) -> str:
    return f"{number / 1e6:.1f}"


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/kernels.md")
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
