"""Kernels built for GPUs that are not there: within the limits, the same bytes every time, cached."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from keysieve.errors import ConfigError
from keysieve.kernels import SCOPES
from keysieve.kernels.triton.aot import ARCHITECTURES, PORTABLE, build, build_variant
from keysieve.kernels.triton.attend_variant import attend
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.kernels.triton.report import MODELS, filled, limits_broken, occupancy
from keysieve.kernels.triton.variants import variants

ROOT = Path(__file__).parents[3]
SMALL = KernelConfiguration(
    layers=2, query_heads=4, kv_heads=2, head_dim=64, value_dim=64, rotary_dim=64, dtype="float16"
)
NAMES = ["score", "select_plan", "update"]
WIDE = {"head_dim": 256, "value_dim": 256}
SHAPES = [
    {"head_dim": 64, "query_heads": 9, "kv_heads": 3},
    {"head_dim": 80, "rotary_dim": 32},
    {"head_dim": 96, "value_dim": 64},
    {"head_dim": 128, "query_heads": 16, "kv_heads": 1},
    {"head_dim": 256, "rotary_dim": 64, "query_heads": 16, "kv_heads": 1},
    {"head_dim": 256},
    {"head_dim": 8, "rotary_dim": 2},
    {"head_dim": 256, "rotary_dim": 2},
    {"head_dim": 64, "rotary_dim": 0},
]


def configuration(**changes):
    head_dim = changes.get("head_dim", 128)
    values = {"layers": 36, "query_heads": 32, "kv_heads": 8, "value_dim": head_dim, "rotary_dim": head_dim}
    return KernelConfiguration(**{"head_dim": head_dim, "dtype": "bfloat16"} | values | changes)


@pytest.fixture(scope="module")
def built(kernel_cache):
    return build(SMALL, (80, 90), kernel_cache)


def test_every_kernel_for_every_architecture(built):
    assert [(one.name, one.arch) for one in built] == [(name, arch) for arch in (80, 90) for name in NAMES]
    for one in built:
        assert one.cubin.startswith(b"\x7fELF")
        assert f".entry {one.entry}(" in one.ptx
        assert f".reqntid {32 * one.num_warps}" in one.ptx
        assert not limits_broken(one)
        assert 0 < occupancy(one) <= 1


def test_parameters_are_those_of_the_ptx_with_two_null_pointers_behind(built):
    for one in built:
        declared = [name for name, _ in one.parameters]
        assert declared == [name for name, _ in variants(SMALL)[one.name].parameters] + declared[-2:]
        assert one.parameters[-2:] == (("global_scratch", "pointer"), ("profile_scratch", "pointer"))
        for index in (len(declared) - 2, len(declared) - 1):  # declared, but never read
            assert one.ptx.count(f"{one.entry}_param_{index}") == 1


def test_no_tensor_core_and_no_path_in_the_code(built):
    for one in built:
        assert "mma" not in one.ptx
        assert ".loc" not in one.ptx
        assert ".file" not in one.ptx
        for text in (one.ptx.encode(), one.cubin):
            assert b"/tmp" not in text
            assert str(ROOT).encode() not in text


def test_the_portable_ptx_asks_for_the_oldest_version(built):
    portable = built[0]
    assert portable.arch == PORTABLE
    assert portable.ptx_version == "8.0"
    assert ".target sm_80\n" in portable.ptx


def test_keys_are_read_sixteen_bytes_at_once(built):
    score, update = built[0], built[2]
    assert "ld.global.v4" in score.ptx
    assert "ld.global.v4" in update.ptx
    assert "st.global.v4" in update.ptx


def test_the_same_bytes_in_another_process(built, tmp_path):
    script = (
        "from pathlib import Path; from keysieve.kernels.triton.aot import build; "
        "from keysieve.kernels.triton.configuration import KernelConfiguration; "
        f"build({SMALL!r}, (80, 90), Path('fresh'))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert build(SMALL, (80, 90), tmp_path / "fresh") == built
    assert len(list((tmp_path / "fresh").iterdir())) == 6


def test_what_is_cached_is_not_built_again(built, kernel_cache, monkeypatch):
    monkeypatch.setattr("keysieve.kernels.triton.aot._compile", lambda *_: pytest.fail("built again"))
    assert build(SMALL, (80, 90), kernel_cache) == built
    assert not list(kernel_cache.glob("*.part"))


def test_another_configuration_is_another_cache_entry(built, kernel_cache, monkeypatch):
    rebuilt = []

    def instead(variant, arch):
        rebuilt.append(variant.name)
        return built[0]

    monkeypatch.setattr("keysieve.kernels.triton.aot._compile", instead)
    build(replace(SMALL, sinks=5), (80,), kernel_cache)
    assert rebuilt == ["select_plan"]  # score and update know no sinks


def test_grids():
    grids = {name: variant.grid.of(batch=3, capacity=700) for name, variant in variants(configuration()).items()}
    assert grids == {"score": (264,), "select_plan": (528,), "update": (4 * 16 * 3,)}
    small = variants(replace(SMALL, scope="per_head"))
    assert {name: variant.grid.of(3, 700) for name, variant in small.items()} == {
        "score": (3 * 2 * 2 * 3,),  # parts of 256 rows
        "select_stats": (2 * 2 * 3,),
        "select_plan": (2 * 3,),
        "update": (2 * 4 * 3,),
    }
    assert variants(configuration(scope="union"))["select_plan"].grid.of(3, 700) == (3,)
    assert variants(configuration(value_dim=256))["update"].grid.of(1, 700) == (8 * 16,)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="architecture 75; choose from 80, 86, 89, 90, 100, 120"):
        build(SMALL, (75,))


def test_the_interpreter_is_refused(tmp_path):
    script = (
        "from pathlib import Path; from keysieve.kernels.triton.aot import build; "
        "from keysieve.kernels.triton.configuration import KernelConfiguration; "
        f"build({SMALL!r}, (80,), Path('x'))"
    )
    environment = {"PATH": "", "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "ConfigError: Triton is set to its interpreter; unset TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 100}, "head_dim is 100; the GPU kernels take multiples of 8 up to 256"),
        ({"head_dim": 264}, "head_dim is 264"),
        ({"value_dim": 12}, "value_dim is 12"),
        ({"rotary_dim": 130}, "rotary_dim is 130; it must be even and at most head_dim"),
        ({"rotary_dim": 63}, "rotary_dim is 63"),
        ({"query_heads": 12}, "12 query heads on 8 KV heads"),
        ({"query_heads": 17, "kv_heads": 1}, "1 to 16 query heads"),
        ({"dtype": "float64"}, "dtype is 'float64'; choose one of float16, bfloat16, float32"),
        ({"policy": "best"}, "policy is 'best'"),
        ({"scope": "global"}, "scope is 'global'"),
        ({"layers": 0}, "layers is 0"),
        ({"recent": -1}, "recent is -1"),
    ],
)
def test_a_configuration_that_no_kernel_can_serve(changes, message):
    with pytest.raises(ConfigError, match=message):
        configuration(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("title", MODELS)
def test_limits_of_the_documented_models(title, kernel_cache):
    broken = [line for one in build(MODELS[title], ARCHITECTURES, kernel_cache) for line in limits_broken(one)]
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "interleaved", "offsets"),
    [("bfloat16", False, 1), ("bfloat16", True, 17), ("float32", False, 17), ("float32", True, 1)],
)
def test_limits_over_the_grid(shape, dtype, interleaved, offsets, kernel_cache):
    model = configuration(**shape, dtype=dtype, interleaved=interleaved, offsets=offsets)
    broken = [line for one in build(model, (80,), kernel_cache) for line in limits_broken(one)]
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "scope"),
    [
        ("key_norm", SCOPES[0]),
        ("streaming", SCOPES[0]),
        ("random", SCOPES[0]),
        ("trig", SCOPES[1]),
        ("trig", SCOPES[2]),
    ],
)
def test_limits_of_policies_and_scopes(policy, scope, kernel_cache):
    model = configuration(policy=policy, scope=scope)
    broken = [line for one in build(model, (80, 120), kernel_cache) for line in limits_broken(one)]
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (1, {"batch": 8}),
        (64, {}),
        (512, {}),
        (1, WIDE | {"query_heads": 16, "kv_heads": 1, "windowed": True, "sinks": True, "softcap": 30.0}),
        (1, WIDE | {"query_heads": 16, "kv_heads": 1, "dtype": "float32", "softcap": 30.0, "sinks": True}),
        (64, WIDE | {"windowed": True, "sinks": True, "softcap": 50.0}),
    ],
    ids=str,
)
def test_limits_of_the_attention(tokens, changes, kernel_cache):
    """More registers and shared memory than the others, which report.py gives reasons for; still nothing is spilled."""
    sizes = {"batch": 1, "capacity": 2304, "query_heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}
    work = attend(tokens=tokens, processors=132, **{"dtype": "bfloat16"} | sizes | changes)
    for arch in (80, 90):
        built = build_variant(work.variant, arch, kernel_cache)
        assert not limits_broken(built)
        assert ("mma" in built.ptx) == (changes.get("dtype") != "float32")
        assert "cp.async" in built.ptx


def test_the_attention_is_shared_by_as_many_programs_as_fill_a_gpu():
    def splits(batch, tokens=1, capacity=2304, kv_heads=8, processors=132):
        return attend(batch, tokens, capacity, 4 * kv_heads, kv_heads, 128, 128, "bfloat16", processors).splits

    assert [splits(batch) for batch in (1, 2, 4, 8, 16, 32, 64)] == [18, 16, 8, 4, 2, 1, 1]
    assert splits(1, capacity=32768) == 33
    assert splits(1, capacity=100) == 1
    assert [splits(1, tokens) for tokens in (4, 5, 64, 512)] == [18, 5, 5, 1]
    assert splits(0) == splits(1, tokens=0, capacity=100) == 1


@pytest.mark.slow
def test_the_document_holds_what_is_built(kernel_cache):
    document = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert filled(document, kernel_cache) == document, "run `python -m keysieve.kernels.triton.report docs/kernels.md`"
