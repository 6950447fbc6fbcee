"""The whole way through the command line, on a tiny model: calibrate, compile, inspect, run, compare, mistakes."""

import json
from pathlib import Path

import pytest

from keysieve.compiler.cli import main
from support.tiny_models import save_tiny

pytestmark = pytest.mark.slow

BUDGET, INTERVAL = 24, 8
ROWS = BUDGET + INTERVAL


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its statistics, and a bundle, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    model, stats, bundle = (str(folder / name) for name in ("model", "stats.safetensors", "bundle"))
    save_tiny("llama", model)
    assert main(["calibrate", model, "-o", stats, "--max-tokens", "1500", "--quiet"]) == 0
    sizes = ["--budget", str(BUDGET), "--interval", str(INTERVAL), "--sinks", "2", "--recent", "8"]
    assert main(["compile", model, "-o", bundle, "--stats", stats, *sizes, "--quiet"]) == 0
    return folder


def run_json(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    """The object that a command prints, which must be all it prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


def test_inspect(work: Path, capsys: pytest.CaptureFixture) -> None:
    found = run_json(capsys, "inspect", str(work / "bundle"))
    assert [(layer["kind"], layer["rope_form"], layer["matched"]) for layer in found["layers"]] == [
        ("full", "half_split", True)
    ] * 3
    assert found["kv_bytes_for_budget"] == ROWS * found["kv_bytes_per_token"]
    policy, updates = found["eviction"]["policy"], found["nodes"]["KeySieveUpdate"]
    assert (policy["name"], policy["terms"], found["eviction"]["heads"]) == ("sieve", ["trig", "gate"], "classes")
    assert updates == len(found["caches"]) + found["nodes"]["KeySieveSelect"]  # of layers or parts, and of row states


def test_run(work: Path, capsys: pytest.CaptureFixture) -> None:
    request = ["run", str(work / "bundle"), "--prompt", "The cache", "--max-new-tokens", "60", "--threads", "1"]
    found = run_json(capsys, *request)
    assert found["tokens"] == len(found["token_ids"]) <= 60
    # The last token was never fed.
    fed = found["prompt_tokens"] + found["tokens"] - (found["reason"] == "length")
    assert found["rows_held"] + found["rows_evicted"] == fed
    assert found["rounds"] >= 4
    assert found["capacity"] == ROWS
    per_row = run_json(capsys, "inspect", str(work / "bundle"))["kv_bytes_per_token"]
    assert found["kv_bytes"] == ROWS * per_row
    assert main([*request, "--stats"]) == 0
    output = capsys.readouterr()
    assert output.out == found["text"] + "\n"
    assert "rows evicted" in output.err


def test_compare(work: Path, capsys: pytest.CaptureFixture) -> None:
    text, report = work / "text.txt", work / "report.json"
    text.write_text("A key is kept while it matters, and the rest is forgotten in good order.\n" * 40, "utf-8")
    command = ["compare", str(work / "bundle"), "--text", str(text), "--budgets", "24,64", "-o", str(report)]
    found = run_json(capsys, *command, "--quiet", "--threads", "1")
    assert json.loads(report.read_text(encoding="utf-8")) == found
    assert [row["budget"] for row in found["rows"]] == [24, 64]
    wanted = {"policy", "budget", "scope", "tokens", "kl", "kl_p95", "top1", "ppl", "ppl_dense"}
    assert all(wanted <= set(row) for row in found["rows"])


def test_remember(work: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["remember", str(work / "bundle"), "--tasks", "facts,chat", "--budgets", "24,64", "--tokens", "1600"]
    found = run_json(capsys, *command, "--trials", "2", "--quiet", "--threads", "1")
    assert [(row["task"], row["budget"]) for row in found["rows"]] == [
        ("facts", 24),
        ("facts", 64),
        ("chat", 24),
        ("chat", 64),
    ]
    assert all(0 <= row["kept"] <= row["dense"] <= row["trials"] == 2 for row in found["rows"])


def test_few_tokens_are_a_warning(work: Path, capsys: pytest.CaptureFixture) -> None:
    text = work / "short.txt"
    text.write_text("A key is kept while it matters, and the rest is forgotten in good order.\n" * 3, "utf-8")
    assert main(["compare", str(work / "bundle"), "--text", str(text), "--budgets", "24", "--quiet"]) == 0
    assert "keysieve: warning: the text has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run {work}/nowhere --prompt x", "no bundle at"),
        ("run {work}/bundle --prompt x --budget 10", "budget 10 leaves no row to choose"),
        ("run {work}/bundle --prompt x --capacity 10", "capacity 10 is too small"),
        ("run {work}/bundle --prompt x --max-new-tokens 5000", "the model was made for 4096"),
        ("compare {work}/bundle --text {work}/no.txt", "there is no text file"),
        ("remember {work}/bundle --budgets 24 --tokens 30", "budget 24 evicts nothing"),
        ("remember {work}/bundle --budgets 24 --tokens 5000", "was made for 4,096 positions"),
        ("compile {work}/model -o {work}/bundle --policy streaming", "exists already"),
        ("compile {work}/model -o {work}/new --stats {work}/no.safetensors", "no such file"),
        ("compile {work}/none -o {work}/new --policy streaming", "cannot load"),
    ],
)
def test_bad_input_is_one_line_and_1(command: str, message: str, work: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(work.rglob("*"))
    assert main([word.format(work=work) for word in command.split()]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("keysieve: error: ") and message in output.err
    assert sorted(work.rglob("*")) == before


def test_a_model_without_rope_cannot_be_compiled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = str(save_tiny("gpt2", tmp_path / "gpt2"))
    assert main(["compile", model, "-o", str(tmp_path / "out"), "--policy", "streaming", "--quiet"]) == 1
    assert "rotary embedding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_target_torch(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Compiled, inspected, run and compared: what ONNX Runtime prints, but for the speed."""
    bundle = str(tmp_path / "torch")
    sizes = ["--budget", str(BUDGET), "--interval", str(INTERVAL), "--sinks", "2", "--recent", "8"]
    made = ["--stats", str(work / "stats.safetensors"), *sizes, "--target", "torch", "--quiet"]
    assert main(["compile", str(work / "model"), "-o", bundle, *made]) == 0
    text = tmp_path / "text.txt"
    text.write_text("The rows that matter least are evicted, and the others move together in their order. " * 30)
    verbs = (
        ["inspect"],
        ["run", "--prompt", "The cache", "--max-new-tokens", "60"],
        ["compare", "--text", str(text), "--budgets", str(BUDGET), "--quiet"],
    )
    for verb, *options in verbs:
        found, wanted = (run_json(capsys, verb, folder, *options) for folder in (bundle, str(work / "bundle")))
        if verb == "compare":
            assert found["rows"][0]["kl"] == pytest.approx(wanted["rows"][0]["kl"], rel=1e-3)
            assert found["rows"][0]["rows_evicted"] == wanted["rows"][0]["rows_evicted"] > 0
        for changing in ("tokens_per_s", "prompt_seconds", "target", "rows"):
            found.pop(changing, None), wanted.pop(changing, None)
        assert found == wanted
