"""models: which architectures were tested, with which versions, and what came of it.

The table is the file models.json beside this one, which `benchmarks/models.py` writes from the results of the tests on
many tiny models: per pair of versions, one record a model. A model that is not in it is tried like any other.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

TABLE = "models.json"
STATUSES = ("pass", "matched", "refused", "fail")


@dataclass(frozen=True)
class Outcome:
    """What was found for one model.

    status: "pass" (compiled, and run like the original and like the reference of eviction), "refused" or "fail"; in
    the table also "matched": all layers match, and it was not compiled with these versions.
    attention, rope_form: the kinds among its layers; None where no layer says. evicts: how many of its `layers` evict.
    reason: why it was refused or failed.
    """

    architecture: str
    status: str
    attention: str | None
    rope_form: str | None
    layers: int
    evicts: int
    reason: str | None


@dataclass(frozen=True)
class Versions:
    """What the models were tested with."""

    transformers: str
    torch: str

    def __str__(self) -> str:
        return f"transformers {self.transformers}, torch {self.torch}"


@dataclass(frozen=True)
class TestedModel:
    """One outcome and the versions that have it; a model that fares differently with other versions has two.

    matched: versions with which a model that passes was only matched.
    """

    outcome: Outcome
    versions: tuple[Versions, ...]
    matched: tuple[Versions, ...] = ()

    @property
    def transformers(self) -> list[str]:
        return unique(tested.transformers for tested in self.versions)

    def tested_with(self, library: str) -> str:
        """ "5.23.0, (5.3.0)": the versions of a library; in brackets those with which the model was only matched."""
        whole = unique(getattr(versions, library) for versions in self.versions)
        rest = unique(getattr(versions, library) for versions in self.matched)
        return ", ".join([*whole, *(f"({version})" for version in rest if version not in whole)])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        found = self.outcome
        return {
            "architecture": found.architecture,
            "status": found.status,
            "attention": found.attention,
            "rope_form": found.rope_form,
            "reason": found.reason,
            "transformers": self.transformers,
        }


Table = dict[Versions, dict[str, Outcome]]
"""Versions -> name of a tiny model -> its outcome; the versions that matter most come first."""


def read_table(text: str | None = None) -> Table:
    """The table of this package, or of a file's text."""
    text = text if text is not None else files("keysieve.compiler").joinpath(TABLE).read_text(encoding="utf-8")
    return {
        Versions(run["transformers"], run["torch"]): {name: Outcome(**found) for name, found in run["models"].items()}
        for run in json.loads(text)["runs"]
    }


def table_text(table: Table) -> str:
    """The file's text: one line a model, so that a change of one is a change of one line."""
    runs = []
    for versions, outcomes in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(asdict(outcome))}" for name, outcome in outcomes.items()]
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(versions).items())
        runs.append(f'{{{head}, "models": {{\n' + ",\n".join(lines) + "\n }}")
    return '{"runs": [\n' + ",\n".join(f" {run}" for run in runs) + "\n]}\n"


def models(table: Table | None = None) -> list[TestedModel]:
    """The tested models, those that pass first; models of one architecture with the same outcome share an entry."""
    table = read_table() if table is None else table
    found: dict[TestedModel, None] = {}
    for name in unique(name for outcomes in table.values() for name in outcomes):
        fates: dict[Outcome, list[Versions]] = {}
        for versions, outcomes in table.items():
            if name in outcomes:
                fates.setdefault(outcomes[name], []).append(versions)
        for outcome, tested in fates.items():
            if outcome.status == "matched" and replace(outcome, status="pass") in fates:
                continue
            matched = fates.get(replace(outcome, status="matched"), []) if outcome.status == "pass" else []
            found[TestedModel(outcome, tuple(tested), tuple(matched))] = None
    return sorted(found, key=lambda model: STATUSES.index(model.outcome.status))


def unique(values: Iterable[str]) -> list[str]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(values))
