"""models: how the table is folded, and that an architecture outside of it is tried like any other."""

from pathlib import Path

import pytest
from transformers import SeedOssConfig

from keysieve.compiler.inspect import inspect
from keysieve.compiler.models import Outcome, Table, Versions, models, read_table, table_text
from keysieve.compiler.progress import Progress
from support.tiny_models import shape

NEW, OLD = Versions("5.23.0", "2.13.0"), Versions("5.3.0", "2.13.0")
PASS = Outcome("AForCausalLM", "pass", "full", "half_split", 3, 3, None)
REFUSED = Outcome("AForCausalLM", "refused", "full", None, 3, 0, "no RoPE")
MATCHED = Outcome("AForCausalLM", "matched", "full", "half_split", 3, 3, None)


def test_the_file_is_read_as_it_was_written() -> None:
    table: Table = {NEW: {"a": PASS, "b, windows": REFUSED}, OLD: {"a": MATCHED}}
    text = table_text(table)
    assert read_table(text) == table and list(read_table(text)) == [NEW, OLD]
    assert len(text.splitlines()) == 1 + 2 * 2 + 3 + 1, "one line a model"


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (PASS, PASS, [("pass", ["5.23.0", "5.3.0"], 0)]),
        (PASS, MATCHED, [("pass", ["5.23.0"], 1)]),
        (PASS, REFUSED, [("pass", ["5.23.0"], 0), ("refused", ["5.3.0"], 0)]),
        (REFUSED, PASS, [("pass", ["5.3.0"], 0), ("refused", ["5.23.0"], 0)]),
        (MATCHED, MATCHED, [("matched", ["5.23.0", "5.3.0"], 0)]),
        (PASS, None, [("pass", ["5.23.0"], 0)]),
    ],
)
def test_an_outcome_names_the_versions_that_have_it(new: Outcome, old: Outcome | None, expected: list) -> None:
    table: Table = {NEW: {"a": new}, OLD: {"a": old} if old else {}}
    found = models(table)
    assert [(m.outcome.status, m.transformers, len(m.matched)) for m in found] == expected


def test_versions_that_only_match_are_in_brackets() -> None:
    newer = Versions("5.23.0", "2.14.1")
    (model,) = models({newer: {"a": MATCHED}, NEW: {"a": PASS}, OLD: {"a": MATCHED}})
    assert model.tested_with("transformers") == "5.23.0, (5.3.0)"
    assert model.tested_with("torch") == "2.13.0, (2.14.1)"


def test_models_of_one_architecture_with_one_outcome_share_an_entry() -> None:
    assert len(models({NEW: {"a": PASS, "a, linear": PASS, "a, odd": REFUSED}})) == 2


def test_an_architecture_that_nobody_tested_is_tried(tmp_path: Path) -> None:
    SeedOssConfig(**shape(num_key_value_heads=2, head_dim=16), architectures=["SeedOssForCausalLM"]).save_pretrained(
        tmp_path
    )
    report = inspect(tmp_path, progress=Progress(quiet=True))
    assert report.architecture not in {model.outcome.architecture for model in models()}, "choose another one"
    assert [(layer.matched, layer.rope_form) for layer in report.layers] == [(True, "half_split")] * 3
