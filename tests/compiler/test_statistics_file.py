"""Gates and shares in the statistics file, and files from before they were there."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from keysieve.compiler.statistics import LayerStatistics, Learned, Statistics, check_matches
from keysieve.compiler.statistics_file import LEARNED, load, save
from keysieve.errors import StatisticsError
from keysieve.passes.rope_form import RopeForm

ROPE = RopeForm("half_split", 4, 4, np.array([1.0, 0.1]))
PLAN = Learned(seed=3, contexts=2, held_out=1, texts=1, context_tokens=64, share_context=512, budgets=[256], done=4)


def layer(number: int, **changes) -> LayerStatistics:
    learned = {
        "gate_weight": np.arange(6, dtype=np.float32).reshape(2, 3) + number,
        "gate_bias": np.float32([-1.0, -2.0]),
        "gate_fit": np.float32([0.5, 0.7]),
        "share": np.float32([[0.75, 1.25]]),
    }
    return LayerStatistics(number, ROPE, np.ones((4, 4)), np.full((4, 2), 2.0), **(learned | changes))


def made(plan: Learned | None = PLAN) -> Statistics:
    return Statistics([layer(0), layer(1)], 80, 80, "feed", {"architecture": "A"}, 16, learned=plan)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stats"


def rewrite(path, change) -> None:
    """Change the tensors, the header or the version of a file."""
    with safe_open(path, "np") as file:
        metadata = dict(file.metadata())
    tensors, header = load_file(path), json.loads(metadata["statistics"])
    change(tensors, header, metadata)
    save_file(tensors, path, metadata | {"statistics": json.dumps(header)})


def test_round_trip(path):
    save(made(), path)
    found = load(path)
    assert found.learned == PLAN
    for entry, expected in zip(found.layers, made().layers, strict=True):
        for name in LEARNED:
            np.testing.assert_array_equal(getattr(entry, name), getattr(expected, name))
            assert getattr(entry, name).dtype == np.float32
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["statistics"])
    assert (header["share_budgets"], header["share_context"]) == ([256], 512)
    assert header["gate_correlation"] == {"0": 0.6, "1": 0.6}


def test_unfinished_sums_are_kept_in_float64(path):
    plan = replace(PLAN, done=1, sums={1: {"xx": np.eye(3) / 3, "count": np.array([60.0])}})
    save(made(plan), path)
    sums = load(path).learned.sums
    assert sums.keys() == {1} and sums[1].keys() == {"xx", "count"}
    np.testing.assert_array_equal(sums[1]["xx"], np.eye(3) / 3)


def test_files_of_format_1_are_read(path):
    save(Statistics([layer(0, **dict.fromkeys(LEARNED))], 80, 80, "feed", {}, 16), path)
    rewrite(path, lambda tensors, header, metadata: (header.pop("learned"), metadata.update(version="1")))
    found = load(path)
    assert found.learned is None and all(getattr(found.layers[0], name) is None for name in LEARNED)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate_weight", np.float32([[np.nan] * 3] * 2), "layer 1: gate_weight holds NaN"),
        ("gate_bias", np.float32([np.inf, 0]), "layer 1: gate_bias holds NaN or infinity"),
        ("gate_fit", np.float32([np.nan, 0]), "layer 1: gate_fit holds NaN"),
        ("gate_weight", np.zeros((3, 3), np.float32), r"layer 1: gate_weight has shape \[3, 3\] instead of \[2, 3\]"),
        ("gate_weight", np.zeros(3, np.float32), r"layer 1: gate_weight has shape \[3\]"),
        ("share", np.ones((1, 3), np.float32), r"layer 1: share has shape \[1, 3\] instead of \[1, 2\]"),
        ("share", np.ones(2, np.float32), r"layer 1: share has shape \[2\]"),
        ("share", np.float32([[1, 0]]), "layer 1: share of KV head 1 at budget 0 is 0, and must be positive"),
        ("share", np.float32([[-1, 1]]), "layer 1: share of KV head 0 .* -1"),
        ("share", np.float32([[np.nan, 1]]), "layer 1: share holds NaN"),
        ("gate_bias", np.zeros(2), "layer 1: gate_bias is of type F64 instead of F32"),
        ("gate_bias", None, "layer 1: gate_bias is missing beside gate_weight"),
        ("gate_weight", None, "layer 1: gate_weight is missing beside gate_bias"),
    ],
)
def test_bad_gates_and_shares_name_the_layer(path, name, value, message):
    save(made(), path)

    def change(tensors, header, metadata):
        del tensors[f"layers.001.{name}"]
        if value is not None:
            tensors[f"layers.001.{name}"] = value

    rewrite(path, change)
    with pytest.raises(StatisticsError, match=f"stats: {message}"):
        load(path)


@pytest.mark.parametrize("change", [lambda told: told.pop("budgets"), lambda told: told.update(done="x")])
def test_a_damaged_plan_is_an_error(path, change):
    save(made(), path)
    rewrite(path, lambda tensors, header, metadata: change(header["learned"]))
    with pytest.raises(StatisticsError, match="damaged metadata"):
        load(path)


def test_statistics_of_another_model_are_refused():
    with pytest.raises(StatisticsError, match="architecture is 'A' in the file and 'B' in the model"):
        check_matches(made(), {"architecture": "B"}, [ROPE, ROPE])


def test_what_is_no_statistics_file_is_called_by_its_name(tmp_path):
    with pytest.raises(StatisticsError, match="is a folder; name the statistics file itself"):
        load(tmp_path)
    (tmp_path / "x.pt").touch()
    with pytest.raises(StatisticsError, match=r"x.pt has the TriAttention format, which `keysieve compile"):
        load(tmp_path / "x.pt")
