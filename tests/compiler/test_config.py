"""Options are checked when they are made, and every message says what to choose instead."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from keysieve.compiler.config import (
    CENTRES,
    DTYPES,
    POLICIES,
    PROMPTS,
    SCOPES,
    CompileConfig,
    EvictionConfig,
    PolicyConfig,
    as_dict,
    check_budget,
)
from keysieve.errors import ConfigError

STREAMING = EvictionConfig(PolicyConfig("streaming"))


def test_the_defaults_are_those_of_the_command_line() -> None:
    eviction = EvictionConfig(PolicyConfig("triattention"))
    assert (eviction.budget, eviction.interval, eviction.sinks, eviction.recent) == (2048, 128, 4, 128)
    assert (eviction.scope, eviction.prompt) == ("per_layer_per_head", "evictable")
    policy = eviction.policy
    assert (policy.name, policy.centres, policy.aggregation, policy.trig, policy.norm) == (
        "triattention",
        "calibrated",
        "mean",
        True,
        True,
    )


@pytest.mark.parametrize(
    ("make", "allowed"),
    [
        (lambda name: PolicyConfig(name), POLICIES),
        (lambda name: PolicyConfig("triattention", centres=name), CENTRES),
        (lambda name: PolicyConfig("triattention", aggregation=name), ("mean", "max")),
        (lambda name: EvictionConfig(PolicyConfig("triattention"), scope=name), SCOPES),
        (lambda name: EvictionConfig(PolicyConfig("triattention"), prompt=name), PROMPTS),
        (lambda name: CompileConfig(STREAMING, dtype=name), DTYPES),
    ],
)
def test_an_unknown_name_lists_the_known_ones(make: Any, allowed: tuple[str, ...]) -> None:
    for name in allowed:
        make(name)
    with pytest.raises(ConfigError) as error:
        make("h2o")
    assert "unknown" in str(error.value) and "'h2o'" in str(error.value)
    assert ", ".join(allowed) in str(error.value)


def test_offsets_are_the_powers_of_two_up_to_the_largest() -> None:
    assert PolicyConfig("triattention").offsets == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert PolicyConfig("triattention", offset_max=1).offsets == [1]


@pytest.mark.parametrize("offset_max", [0, -4, 3, 100])
def test_an_offset_that_is_no_power_of_two_is_refused(offset_max: int) -> None:
    with pytest.raises(ConfigError, match=f"offset_max {offset_max} must be a power of two"):
        PolicyConfig("triattention", offset_max=offset_max)


def test_a_score_without_terms_is_refused() -> None:
    PolicyConfig("triattention", trig=False)
    PolicyConfig("triattention", norm=False)
    with pytest.raises(ConfigError, match=r"trig and norm are both off.*turn one on"):
        PolicyConfig("triattention", trig=False, norm=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget is 0; it must be at least 1"),
        ({"interval": 0}, "interval is 0; it must be at least 1"),
        ({"sinks": -1}, "sinks is -1; it must be at least 0"),
        ({"recent": -2}, "recent is -2; it must be at least 0"),
    ],
)
def test_sizes_below_the_least_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvictionConfig(**changes)


@pytest.mark.parametrize(("budget", "sinks", "recent"), [(132, 4, 128), (131, 4, 128), (10, 10, 0), (5, 0, 5)])
def test_a_budget_must_exceed_what_is_always_kept(budget: int, sinks: int, recent: int) -> None:
    for check in (
        lambda *sizes: EvictionConfig(PolicyConfig("triattention"), budget=sizes[0], sinks=sizes[1], recent=sizes[2]),
        check_budget,
    ):
        with pytest.raises(ConfigError) as error:
            check(budget, sinks, recent)
        for part in (f"budget {budget}", f"sinks {sinks}", f"recent {recent}", f"above {sinks + recent}"):
            assert part in str(error.value)
        check(sinks + recent + 1, sinks, recent)


def test_calibrated_centres_need_a_file_and_the_rest_does_not() -> None:
    with pytest.raises(ConfigError, match=r"--stats FILE.*--centres online"):
        CompileConfig(EvictionConfig(PolicyConfig("triattention")))
    assert CompileConfig(EvictionConfig(PolicyConfig("triattention")), stats=Path("s")).stats == Path("s")
    online = EvictionConfig(PolicyConfig("triattention", centres="online"))
    assert CompileConfig(online).stats is None
    assert CompileConfig(online, stats=Path("s")).stats == Path("s")  # where online centres start
    assert not PolicyConfig("random").needs_statistics


@pytest.mark.parametrize("name", ["streaming", "key-norm", "random"])
def test_statistics_that_would_be_ignored_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"policy {name} uses no statistics; leave --stats out"):
        CompileConfig(EvictionConfig(PolicyConfig(name)), stats=Path("stats.safetensors"))


def test_configs_cannot_be_changed_and_are_json_ready() -> None:
    config = CompileConfig(EvictionConfig(PolicyConfig("triattention")), stats=Path("stats.safetensors"))
    with pytest.raises(FrozenInstanceError):
        config.dtype = "float16"  # type: ignore[misc]
    found = json.loads(json.dumps(as_dict(config)))
    assert found["stats"] == "stats.safetensors"
    assert found["eviction"]["policy"]["name"] == "triattention"


ONLINE = EvictionConfig(PolicyConfig("triattention", centres="online"))


def test_weights_and_caches_may_have_a_type_of_their_own() -> None:
    assert CompileConfig(ONLINE, dtype="float16").cache_dtype == "float16"
    assert CompileConfig(ONLINE, weights="int4", kv_dtype="bfloat16").cache_dtype == "bfloat16"
    assert CompileConfig(ONLINE, dtype="float16", kv_dtype="float16", target="tensorrt").cache_dtype == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "unknown weights 'int3'; choose one of int8, int4"),
        ({"kv_dtype": "int8"}, "unknown kv-dtype 'int8'"),
        ({"weights": "int4", "target": "tensorrt-rtx"}, "--weights int4 is for ONNX Runtime"),
        ({"kv_dtype": "float16", "target": "tensorrt"}, "--kv-dtype float16 is for ONNX Runtime"),
        ({"weights": "int8", "dtype": "float16"}, "--weights int8 needs activations in float32"),
        ({"kv_dtype": "float32", "dtype": "bfloat16"}, "--kv-dtype float32 needs activations in float32"),
        ({"weights": "int4", "inline": True}, "leave --inline out"),
    ],
)
def test_types_that_a_target_does_not_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompileConfig(ONLINE, **options)
