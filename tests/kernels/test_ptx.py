"""The emitted PTX, executed on the CPU: against the reference, with its traffic counted, and with mistakes put in."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keysieve.kernels.triton.aot import Artifact, build, build_variant
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.variants import select_plan, update_numbers
from support.ptx import Device, PtxError, parse
from support.ptx.arithmetic import multiply_high
from support.ptx.cases import Case, Selection, plan_case, score_case, stats_case, update_case
from support.ptx.mutate import mutants

MODELS = {
    "grouped": KernelConfiguration(2, 6, 2, 64, 48, 64, "bfloat16", sinks=4, recent=16),
    "interleaved": KernelConfiguration(
        2, 4, 2, 40, 40, 32, "float32", interleaved=True, offsets=2, scope="per_head", sinks=0, recent=0
    ),
    "partial": KernelConfiguration(2, 2, 2, 128, 128, 64, "float16", scope="union", recent=128),
    "key_norm": KernelConfiguration(1, 8, 2, 64, 64, 64, "float16", policy="key_norm", recent=16),
    "random": KernelConfiguration(2, 4, 2, 64, 64, 64, "bfloat16", policy="random"),
}
ARCHITECTURES = (80, 90)
# Mistakes are put into the kernels of these models; select_plan has the statistics inside where plans are per layer and
# head.
MUTATED = {"score": "grouped", "select_stats": "interleaved", "select_plan": "key_norm", "update": "grouped"}
# How many mutants change nothing that can be seen, and why.
HARMLESS = {
    # Whether anything is due: where it is not, nothing is done later either.
    ("score", "compare"): 1,
    ("select_stats", "compare"): 1,
    # The same, and that another program than the first writes keep and evicted.
    ("select_plan", "compare"): 2,
    ("select_plan", "guard"): 1,
    # The barrier between writing ranks and reading them: a thread reads only what it wrote itself.
    ("select_plan", "barrier"): 1,
    # Programs of even index take the values and odd ones the keys: everything is moved all the same.
    ("update", "compare"): 1,
}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cases(model: KernelConfiguration) -> dict[str, Case]:
    """Some 300 rows (select: 1100, more than a program looks at together; update: 5 of its tiles and a bit)

    The second sequence is not due.
    """
    due, capacity = (ints(300, 150, 255), ints(280, 151, 255)), 311
    select = Selection(
        model, ints(1100, 300, 950), ints(1000, 301, 950), ints(700, 200, 850), ints(20, 0, 0), capacity=1300
    )
    return {
        "score": score_case(model, *due, capacity),
        "select_stats": stats_case(select),
        "select_plan": plan_case(select),
        "update": update_case(
            model, ints(1400, 150, 301), ints(1300, -1, 260), capacity=1411, tokens=70, layer=model.layers - 1
        ),
    }


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """name of a model, architecture -> its kernels by name."""
    cache = tmp_path_factory.mktemp("kernels")

    def of(model: str, arch: int) -> dict[str, Artifact]:
        return {artifact.name: artifact for artifact in build(MODELS[model], (arch,), cache)}

    return of


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", MODELS)
def test_kernels_equal_the_reference(artifacts, model, arch):
    inputs = cases(MODELS[model])
    for name, artifact in artifacts(model, arch).items():
        report = inputs[name].run(artifact, seed=arch, most=2, turns=2)  # so few programs that they take several parts
        assert report.steps > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("model", ["grouped", "interleaved", "partial"])
def test_select_with_utilities_equals_the_reference(model, arch):
    m = MODELS[model]
    kernel = build_variant(select_plan(m.layers, m.query_heads, m.kv_heads, m.sinks, m.recent, m.scope, True), arch)
    select = Selection(m, ints(1100, 300, 950), ints(1000, 301, 950), ints(700, 200, 850), ints(20, 0, 0), 1300)
    plan_case(select, gated=True).run(kernel, seed=arch, most=2, turns=2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("plan_heads", [1, 3])
def test_rows_of_one_number_are_updated_as_the_reference_says(plan_heads, arch):
    sizes = {"kv_heads": 3, "head_dim": 1, "value_dim": 1, "plan_layers": 1, "plan_heads": plan_heads}
    case = update_case(
        SimpleNamespace(dtype="float32", **sizes), ints(1400, 150, 301), ints(1300, -1, 0), capacity=1411, tokens=70
    )
    case.run(build_variant(update_numbers(3, plan_heads), arch), seed=arch)


@pytest.mark.parametrize("name", ("score", "select_stats", "select_plan"))
def test_a_step_in_which_nothing_is_due_leaves_at_once(artifacts, name):
    model = MODELS["interleaved"]
    never, capacity = ints(300, 256, 256), 311
    lengths = ints(299, 150, 255)
    select = Selection(model, lengths, never, ints(200, 200, 200), ints(20, 0, 0), capacity)
    case = {
        "score": lambda: score_case(model, lengths, never, capacity),
        "select_stats": lambda: stats_case(select),
        "select_plan": lambda: plan_case(select),
    }[name]()
    report = case.run(artifacts("interleaved", 80)[name], count=True, turns=1)
    assert report.barriers <= 2
    read = set(report.traffic.read) - {name for name, read in report.traffic.read.items() if not read}
    assert read <= {"length", "limit", "budget"}


def test_a_round_moves_hardly_more_than_the_rows_it_must():
    """2176 -> 2048 rows of one KV head of one layer, D 128, bfloat16; other heads and layers are as many times that.

    The least is to read every key once, and to read and write once every row of keys and values that moves.
    """
    model = KernelConfiguration(1, 4, 1, 128, 128, 128, "bfloat16")
    kernels = {artifact.name: artifact for artifact in build(model, (80,))}
    rows, kept, capacity, tokens = 2176, 2048, 2304, 1
    selection = Selection(model, ints(rows), ints(rows), ints(kept), ints(0), capacity)
    inputs = {
        "score": score_case(model, ints(rows), ints(rows), capacity),
        "select_plan": plan_case(selection),
        "update": update_case(model, ints(rows), ints(kept), capacity, tokens),
    }
    traffic = {name: case.run(kernels[name], count=True, turns=1).traffic for name, case in inputs.items()}

    row = 2 * model.head_dim  # bytes
    update = traffic["update"]
    assert traffic["score"].read["keys of layer 0"] == rows * row
    moved = update.read["key"] // row
    assert 0 < moved <= kept - kept // 8, "rows that stay in their place are read"
    assert update.read["key"] == update.read["value"] == moved * row
    assert update.written["key"] == update.written["value"] == (moved + tokens) * row
    least = rows * row + 4 * moved * row
    total = sum(sum(kernel.read.values()) + sum(kernel.written.values()) for kernel in traffic.values())
    assert total <= 1.1 * least, f"{total / least:.3f} times the least: {traffic}"


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATED)
def test_every_mistake_in_the_ptx_is_noticed(artifacts, name):
    """One barrier less, one guard turned round, or one comparison turned round: an error or a wrong result."""
    model = MUTATED[name]
    _assert_noticed(cases(MODELS[model])[name], artifacts(model, 80)[name], mutants)


@pytest.mark.parametrize("name", MUTATED)
def test_every_missing_barrier_is_noticed_on_hopper_too(artifacts, name):
    model = MUTATED[name]
    _assert_noticed(cases(MODELS[model])[name], artifacts(model, 90)[name], missing_barriers)


def missing_barriers(ptx):
    return (mutant for mutant in mutants(ptx) if mutant.kind == "barrier")


def _assert_noticed(case, artifact, mistakes):
    """Two programs share what is to be done, where several can, so that each has several parts."""
    max_steps = 3 * case.run(artifact, most=2, turns=1).steps
    tried, unnoticed = Counter(), []
    for mutant in mistakes(artifact.ptx):
        tried[mutant.kind] += 1
        try:
            case.run(artifact, mutant.ptx, most=2, turns=1, max_steps=max_steps)
        except (PtxError, AssertionError):
            continue
        unnoticed.append(mutant)
    assert tried["barrier"] > 0
    harmless = {kind: HARMLESS.get((artifact.name, kind), 0) for kind in tried}
    found = Counter(mutant.kind for mutant in unnoticed)
    lines = [f"{mutant.kind} in line {mutant.line}: {mutant.original}" for mutant in unnoticed]
    assert found == Counter({kind: count for kind, count in harmless.items() if count}), "\n".join(lines)


KERNEL = """
.visible .entry small(.param .u64 .ptr .global .align 1 small_param_0, .param .u32 small_param_1)
.reqntid 64
{
	.reg .pred %p<4>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r3, %r3, %r2;
	ld.param.b64 %rd1, [small_param_0];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd1, %rd1, %rd2;
	xor.b32 %r4, %r3, 128;
	setp.lt.s32 %p1, %r1, 32;
	BODY
	ret;
}
"""


def run_small(body: str, seed: int = 0) -> np.ndarray:
    """Run two warps on 64 words of shared memory and 64 of global memory, of which the first half is held."""
    device = Device(seed)
    words = device.array("words", np.arange(64, dtype="u4"), held=np.arange(64) < 32)
    device.launch(parse(KERNEL.replace("BODY", body)), (1,), [words, 7], shared=256, max_steps=100)
    return words.values


def test_the_upper_half_of_products():
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (2, 1000))
    for kind in ("i8", "u8", "i4", "u4"):
        a, b = numbers.astype(kind)
        want = [int(x) * int(y) >> 4 * 2 * a.itemsize for x, y in zip(a, b, strict=True)]
        assert multiply_high(a, b).tolist() == want


def test_warps_exchange_through_shared_memory_across_a_barrier():
    body = "st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd1], %r5;"
    assert (run_small(body) == np.arange(64) ^ 32).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.shared.b32 [%r3], %r1; ld.shared.b32 %r5, [%r4];", "race|nobody has written"),
        ("st.shared.b32 [global_smem], %r1;", "race"),
        ("st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4]; st.shared.b32 [%r3], %r5;", "race"),
        ("ld.shared.b32 %r5, [%r3];", "nobody has written"),
        ("ld.global.b32 %r5, [%rd1];", "byte 128 of words .*nobody has written"),
        ("st.global.b32 [%rd1+256], %r1;", "out of bounds"),
        ("st.shared.b32 [%r3+4], %r1;", "out of bounds"),
        ("st.global.b32 [%rd1+2], %r1;", "not 4-byte aligned"),
        ("@%p1 bar.sync 0;", "deadlock"),
        ("@%p1 ret; shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1; bar.sync 0;", "deadlock"),
        ("setp.lt.s32 %p2, %r1, 7; @%p2 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "some lanes of a warp"),
        ("$L__again: bra $L__again;", "endless"),
        ("add.s32 %r5, %r6, 1;", "%r6.* has no value"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 %r1, %r2;", "line 17: mma.*does not know"),
    ],
)
def test_mistakes_are_errors_that_name_the_line(body, message):
    with pytest.raises(PtxError, match=f"(?s)small.*({message})"):
        run_small(body)
