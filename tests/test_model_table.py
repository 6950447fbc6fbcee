"""compiler/models.json is what the installed versions do, and the documents are what the file says."""

import re
from dataclasses import fields, replace

import pytest

from keysieve.compiler.models import STATUSES, Outcome, Versions, read_table
from support import families, model_table
from support.model_table import MATCHING, MATRIX, differences, documents, outcome_of, saved

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = read_table()
SAVED = TABLE[saved(TABLE)]


def cases() -> list:
    """All models of the table: one of each form of attention and of RoPE is fast, and all others are slow.

    Refused ones are slow, since test_families matches them in the fast tests.
    """
    fast = {}
    for name, outcome in SAVED.items():
        if outcome.status in MATCHING:
            form = re.sub(r"[\d./]+", "", outcome.rope_form or "")  # sizes of the tiny models say nothing
            fast[outcome.attention, form] = name
    return [pytest.param(name, marks=[] if name in fast.values() else pytest.mark.slow) for name in SAVED]


@pytest.mark.parametrize("name", cases())
def test_what_matches_now_is_what_the_table_says(name: str) -> None:
    changed = differences(name, TABLE, outcome_of(name))
    assert not changed, "\n" + changed


def test_every_model_of_the_matrix_is_in_the_table_and_no_other() -> None:
    missing = {str(versions): [name for name in MATRIX if name not in TABLE[versions]] for versions in TABLE}
    assert not any(missing.values()), f"run `make models`: {missing}"
    assert set(SAVED) == set(MATRIX)


def test_nothing_fails_and_all_that_matches_was_compiled() -> None:
    names: dict[str, set[str]] = {status: set() for status in STATUSES}
    for outcomes in TABLE.values():
        for name, outcome in outcomes.items():
            names[outcome.status].add(name)
    assert not names["fail"]
    assert not names["matched"] - names["pass"]
    newest = next(iter(TABLE.values()))
    assert {name for name, outcome in newest.items() if outcome.status == "refused"} == set(families.REFUSED)


def test_two_versions_of_each_library_were_tested() -> None:
    assert len({versions.transformers for versions in TABLE}) >= 2
    assert len({versions.torch for versions in TABLE}) >= 2


@pytest.mark.parametrize("file", documents(TABLE), ids=lambda file: file.name)
def test_documents_are_what_the_table_makes(file) -> None:
    wanted = documents(TABLE)[file]
    assert file.read_text(encoding="utf-8") == wanted, "run `python benchmarks/models.py --documents-only`"


# -- the comparison itself ---------------------------------------------------------------------------------------

PASS = Outcome("AForCausalLM", "pass", "full", "half_split", 3, 3, None)
REFUSED = replace(PASS, status="refused", rope_form=None, evicts=0, reason="the rotation is not linear")
NEW, OLD = Versions("5.23.0", "2.13.0"), Versions("5.3.0", "2.13.0")


@pytest.fixture
def with_versions(monkeypatch: pytest.MonkeyPatch):
    return lambda versions: monkeypatch.setattr(model_table, "installed", lambda: versions)


def test_a_pattern_that_stops_matching_fails_with_both_reasons(with_versions) -> None:
    with_versions(NEW)
    text = differences("a", {NEW: {"a": PASS}}, REFUSED)
    assert text.splitlines()[0] == "a (AForCausalLM) with transformers 5.23.0, torch 2.13.0:"
    assert "  status: saved pass, now refused" in text
    assert "  rope_form: saved half_split, now None" in text
    assert "  reason: saved None, now the rotation is not linear" in text
    assert "python benchmarks/models.py 'a'" in text
    text = differences("a", {NEW: {"a": REFUSED}}, replace(REFUSED, reason="the rotation mixes heads"))
    assert "  reason: saved the rotation is not linear, now the rotation mixes heads" in text


@pytest.mark.parametrize("field", [field.name for field in fields(Outcome) if field.name != "status"])
def test_every_field_is_compared(field: str, with_versions) -> None:
    with_versions(NEW)
    changed = replace(REFUSED, **{field: 7 if isinstance(getattr(REFUSED, field), int) else "else"})
    assert f"  {field}: saved" in differences("a", {NEW: {"a": REFUSED}}, changed)


@pytest.mark.parametrize("status", ["pass", "matched"])
def test_what_matches_alike_is_no_difference(status: str, with_versions) -> None:
    with_versions(NEW)
    assert differences("a", {NEW: {"a": replace(PASS, status=status)}}, PASS) == ""


def test_versions_that_nobody_tested_are_compared_with_the_newest(with_versions) -> None:
    table = {NEW: {"a": PASS}, OLD: {"a": REFUSED}}
    with_versions(Versions("5.99.0", "3.0.0"))
    assert differences("a", table, PASS) == ""
    assert "saved with transformers 5.23.0, torch 2.13.0" in differences("a", table, REFUSED)
    with_versions(OLD)
    assert differences("a", table, REFUSED) == ""
