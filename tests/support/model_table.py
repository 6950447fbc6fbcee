"""compiler/models.json: what it must say about the installed versions, and the documents that are made of it."""

from collections.abc import Iterable
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from keysieve.compiler.config import EvictionConfig, PolicyConfig
from keysieve.compiler.inspect import find_fast, report_of
from keysieve.compiler.models import STATUSES, TABLE, Outcome, Table, TestedModel, Versions, models, unique
from keysieve.compiler.progress import Progress
from keysieve.errors import KeySieveError
from support.families import COMPILED, REFUSED, family_model

ROOT = Path(__file__).parents[2]
TABLE_FILE = ROOT / "compiler" / TABLE
DOCUMENT = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- begin: written by `make models` -->\n", "<!-- end -->\n"
MATCHING = ("pass", "matched")
MATRIX = [*COMPILED, *REFUSED]


def installed() -> Versions:
    """Without what a build adds, such as +cpu."""
    return Versions(*(version(name).split("+")[0] for name in ("transformers", "torch")))


def saved(table: Table) -> Versions:
    """The versions of the table that the installed ones are compared with: the same, else the first."""
    return installed() if installed() in table else next(iter(table))


def outcome_of(name: str) -> Outcome:
    """What finding attention and RoPE in that model of the matrix says now: "pass" if all match, or "refused"."""
    model = family_model(name)
    try:
        matched = find_fast(model, Progress(quiet=True))
    except KeySieveError as error:
        return Outcome(type(model).__name__, "refused", None, None, 0, 0, str(error))
    layers = report_of(model, matched, EvictionConfig(PolicyConfig("triattention")), "float32").layers
    kinds = [layer.kind for layer in layers if layer.kind != "unsupported"]
    kinds += ["softcap"] if any(a.softcap for a in matched.attentions) else []
    kinds += ["sinks"] if any(a.sinks is not None for a in matched.attentions) else []
    return Outcome(
        type(model).__name__,
        "pass" if all(layer.matched for layer in layers) else "refused",
        _joined(kinds),
        _joined(layer.rope_form for layer in layers if layer.rope_form),
        len(layers),
        sum(layer.matched and layer.kind == "full" for layer in layers),
        _joined((layer.reason for layer in layers if layer.reason), "; "),
    )


def differences(name: str, table: Table, now: Outcome) -> str:
    """What of an outcome of that model is not as saved, a line a field; empty where all is.

    Finding says nothing about a test that failed or was not run, so a saved "matched" or "fail" is no other status.
    """
    versions = saved(table)
    before = table[versions][name]
    if before.status == "fail":
        before = replace(before, status=now.status, reason=now.reason)
    if before.status == "matched":
        before = replace(before, status="pass")
    pairs = [(field.name, getattr(before, field.name), getattr(now, field.name)) for field in fields(Outcome)]
    changed = [f"  {field}: saved {then}, now {this}" for field, then, this in pairs if then != this]
    if not changed:
        return ""
    here = installed()
    since = "" if here == versions else f" (saved with {versions})"
    advice = f"if this is as it should be: `python benchmarks/models.py '{name}'` writes the table anew"
    return "\n".join([f"{name} ({now.architecture}) with {here}{since}:", *changed, advice])


def _joined(words: Iterable[str], separator: str = " + ") -> str | None:
    return separator.join(unique(words)) or None


# -- documents -------------------------------------------------------------------------------------------------


def documents(table: Table) -> dict[Path, str]:
    """File -> the whole text that it must have."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return {DOCUMENT: _document(table), README: before + BEGIN + _summary(table) + END + after}


def _document(table: Table) -> str:
    tested, names = models(table), unique(name for outcomes in table.values() for name in outcomes)
    matching = [model for model in tested if model.outcome.status in MATCHING]
    others = [model for model in tested if model.outcome.status not in MATCHING]
    architectures = len({model.outcome.architecture for model in tested})
    runs = [(str(versions), *map(str, _counts(outcomes.values()))) for versions, outcomes in table.items()]
    return f"""# Models

{BEGIN}
What the tests found for {len(names)} tiny models of {architectures} architectures. \
`keysieve models` prints the same table, `--json` for programs.

* **pass**: compiled whole by `keysieve compile`. Without eviction the engine's logits are those of HuggingFace; with \
it, those of an independent reference that masks what was evicted (for GPT-J, Falcon and others that HuggingFace gives \
no hook for, only that eviction happens is checked).
* **matched**: every layer matches; not compiled with these versions. Below, such versions are in brackets.
* **refused**: with layer, node and reason, before anything is written.

A model that is not listed is tried like all others, since no code asks for a model's name: `keysieve inspect MODEL` \
says which layers match, and [extending.md](extending.md) how to add what does not.

{_table(("versions", *STATUSES), runs)}
## What matches

"evicts": layers whose cache is kept inside the budget.

{_table(("architecture", "status", "attention", "RoPE", "evicts", "transformers", "torch"), map(_matching, matching))}
## What does not

{_table(("architecture", "status", "reason", "transformers", "torch"), map(_other, others))}
## How the table is made

`make models` runs `tests/test_families.py` with the versions above, one environment after the other, and writes \
`compiler/models.json`, this file and the table in the README. `tests/test_model_table.py` matches every model of the \
matrix again with what is installed, and fails with what changed and why.
{END}"""


def _counts(outcomes: Iterable[Outcome]) -> list[int]:
    statuses = [outcome.status for outcome in outcomes]
    return [statuses.count(status) for status in STATUSES]


def _matching(model: TestedModel) -> tuple[str, ...]:
    found = model.outcome
    where = f"{found.evicts} of {found.layers} layers"
    words = found.architecture, found.status, found.attention or "", found.rope_form or "", where
    return *words, model.tested_with("transformers"), model.tested_with("torch")


def _other(model: TestedModel) -> tuple[str, ...]:
    words = model.outcome.architecture, model.outcome.status, model.outcome.reason or ""
    return *words, model.tested_with("transformers"), model.tested_with("torch")


def _summary(table: Table) -> str:
    """One row a form of attention and RoPE, and one a reason, with the versions with which the most models pass."""
    versions = max(table, key=lambda run: _counts(table[run].values())[0])
    tested = models({versions: table[versions]})

    def form(model: TestedModel) -> tuple[str, str, str]:
        found = model.outcome
        if found.status not in MATCHING:
            return found.status, "", found.reason or ""
        # sizes of the tiny models and factors of a scaling say nothing here
        words = (found.rope_form or "").replace("scaling ", "scaled ").split()
        return found.status, found.attention or "", " ".join(w for w in words if not w[0].isdigit())

    order = unique(" ".join(form(model)) for model in tested)
    ordered = sorted(tested, key=lambda model: order.index(" ".join(form(model))))
    rows = []
    for (status, attention, words), group in groupby(ordered, key=form):
        names = ", ".join(unique(model.outcome.architecture.removesuffix("ForCausalLM") for model in group))
        rows.append((names, status, f"{attention}; {words}" if attention else words))
    return f"With {versions}:\n\n" + _table(("models", "status", "attention; RoPE, or reason"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
