"""benchmarks/ratios.py on made-up numbers."""

from dataclasses import asdict, replace

import pytest
from ratios import TARGETS, Entry, Target, compare, merged, ratio, round_seconds

OURS = Entry("keysieve", "triattention", "int4", "float32", 8192, 512)
THEIRS = Entry("openvino-genai", "norm_sum", "int4", "u8", 8192, 512)
TURNS = {"wall": ([2.0, 4.0, 30.0], [4.0, 4.0, 60.0]), "cpu": ([1.0, 2.0, 9.0], [4.0, 4.0, 4.0])}


def result(one: Entry = OURS, other: Entry = THEIRS, workload: str = "decode") -> dict:
    samples = {
        entry: [{f"{clock}_s": values[side][turn] for clock, values in TURNS.items()} for turn in range(3)]
        for side, entry in enumerate((one, other))
    }
    return {"rows": [], "ratios": dict([compare(workload, one, other, samples)])}


def target(text: str) -> Target:
    return next(target for target in TARGETS if target.text == text)


def test_a_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    made = ratio([1.0, 10.0, 3.0], [2.0, 2.0, 3.0])
    assert made["pairs"] == [0.5, 5.0, 1.0]
    assert made["median"] == 1.0  # of medians: 1.5


def test_sides_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError):
        ratio([1.0, 2.0], [1.0])


def test_a_comparison_has_both_clocks_and_says_what_was_compared() -> None:
    [(name, found)] = result()["ratios"].items()
    assert found["wall"]["median"] == 0.5
    assert found["cpu"]["median"] == 0.5
    assert found["cpu"]["pairs"] == [0.25, 0.5, 2.25]
    assert (found["numerator"], found["denominator"]) == (asdict(OURS), asdict(THEIRS))
    assert name == "decode: keysieve int4/float32 8192 to 512 x1 / openvino-genai norm_sum int4/u8 8192 to 512 x1"


def test_a_target_takes_the_ratios_that_it_is_about() -> None:
    text = "int4: OpenVINO GenAI's time per token"
    assert [value for _, value in target(text).of(result())] == [0.5]
    others = [
        result(replace(OURS, weights="float32")),
        result(replace(OURS, history=2048)),
        result(replace(OURS, budget=1024)),
        result(other=replace(THEIRS, kv_dtype="float32")),
        result(other=replace(THEIRS, contestant="llama.cpp")),
        result(workload="prefill"),
    ]
    assert all(target(text).of(other) == [] for other in others)


def test_a_speed_up_is_the_inverse_and_has_a_lower_bound() -> None:
    dense = replace(OURS, contestant="keysieve-dense", policy="dense", budget=None)
    found = target("int4, 8k to 512: dense / evicting")
    assert [value for _, value in found.of(result(other=dense))] == [2.0]
    assert found.of(result(other=replace(dense, kv_dtype="float16"))) == []  # another engine
    assert not found.reached(2.0)
    assert found.reached(5.0)


def test_an_upper_bound_is_reached_from_below() -> None:
    found = target("int4: OpenVINO GenAI's time per token")
    assert found.reached(0.75)
    assert not found.reached(0.76)


def test_a_round_is_what_every_interval_has_at_the_same_step() -> None:
    usual = [1.0] * 10
    with_round = [*usual[:4], 3.0, 2.0, *usual[6:]]
    disturbed = [9.0, *with_round[1:]]  # once, by something else
    assert round_seconds([with_round, disturbed, with_round]) == 3.0
    assert round_seconds([usual, [*usual[:9], 50.0], usual]) == 0.0


def test_a_new_row_replaces_the_old_one_of_the_same_setting_only() -> None:
    def row(entry: Entry, ms: float, workload: str = "decode", threads: int = 1) -> dict:
        return {"workload": workload, "threads": threads, **asdict(entry), "ms_per_token": ms}

    old = [row(OURS, 1.0), row(THEIRS, 2.0), row(OURS, 3.0, "memory")]
    new = [
        row(OURS, 4.0),
        row(OURS, 5.0, threads=2),
        row(replace(OURS, batch=8), 6.0),
        row(replace(OURS, budget=None), 7),
    ]
    assert sorted(row["ms_per_token"] for row in merged(old, new)) == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert merged(old, []) == merged([], merged(old, [])) == merged(list(reversed(old)), [])
