"""keysieve run: text as it comes, one JSON object, the chat template, and numbers on stderr."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.engine import Generation, Step, Timing
from keysieve.compiler.session import Counters
from keysieve.errors import EngineError

STOP = 2
FUNCTION = "engine.load"


class FakeEngine:
    """Says "Hi you" in three tokens, then stops."""

    def __init__(self, template: str | None = "template", error: BaseException | None = None) -> None:
        self.manifest = {"stop_tokens": [STOP], "row_states": []}
        self.bundle = SimpleNamespace(path=Path("b"))
        self.tokenizer = SimpleNamespace(chat_template=template, decode=lambda ids: "".join(f"<{one}>" for one in ids))
        self.counters = Counters(1, 2, 384, 24_576, [13], [260], [129], [3])
        self.timing = Timing(prompt_tokens=10, prompt_seconds=0.5, decoded_tokens=4, decode_seconds=2.0)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def generate(self, prompt: str, **options: Any) -> list[Generation]:
        self.requests.append((prompt, options))
        return [Generation("Hi you", [5, 6, 7], "stop")]

    def encode(self, prompt: str, chat: bool) -> list[int]:
        return [10, 11, 12] if chat else [10]

    def stream(self, prompt: str, **options: Any) -> Iterator[Step]:
        self.requests.append((prompt, options))
        if isinstance(self.error, EngineError):
            raise self.error
        return self._steps()

    def _steps(self) -> Iterator[Step]:
        for token, text in ((5, "Hi"), (6, ""), (7, " you"), (STOP, "")):
            yield Step([token], [text])
            if self.error:
                raise self.error


def test_text_goes_to_stdout(stub, capsys: pytest.CaptureFixture) -> None:
    engine = FakeEngine()
    calls = stub(FUNCTION, engine)
    assert main(["run", "b", "--prompt", "Hello"]) == 0
    assert calls == [((Path("b"),), {})]
    assert engine.requests == [("Hello", {"chat": True, "ignore_position_limit": False, "max_new_tokens": 128})]
    output = capsys.readouterr()
    assert (output.out, output.err) == ("Hi you\n", "")


def test_every_option_reaches_the_engine(stub) -> None:
    engine = FakeEngine()
    calls = stub(FUNCTION, engine)
    options = (
        "--max-new-tokens 9 --budget 300 --capacity 500 --chunk 64 --temperature 0.5 --top-p 0.9 --top-k 40 "
        "--seed 7 --raw --ignore-position-limit --threads 2 --device cuda --compile"
    )
    assert main(["run", "b", "--prompt", "x", *options.split()]) == 0
    assert calls == [((Path("b"),), {"threads": 2, "device": "cuda", "compiled": True})]
    assert engine.requests[0][1] == {
        "chat": False,
        "ignore_position_limit": True,
        "max_new_tokens": 9,
        "budget": 300,
        "capacity": 500,
        "chunk": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
    }


def test_a_model_without_chat_template_reads_the_text_as_it_is(stub) -> None:
    engine = FakeEngine(template=None)
    stub(FUNCTION, engine)
    assert main(["run", "b", "--prompt", "x"]) == 0
    assert engine.requests[0][1]["chat"] is False


def test_json_is_one_object_with_the_names_that_others_script_against(stub, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, FakeEngine())
    assert main(["run", "b", "--prompt", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "Hi you",
        "token_ids": [5, 6, 7],
        "reason": "stop",
        "tokens": 3,
        "tokens_per_s": 2.0,
        "prompt_tokens": 10,
        "prompt_seconds": 0.5,
        "rounds": 3,
        "rows_held": 260,
        "rows_evicted": 129,
        "kv_bytes": 24_576,
        "capacity": 384,
    }


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_stats_go_to_stderr(form: list[str], stub, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, FakeEngine())
    assert main(["run", "b", "--prompt", "x", "--stats", *form]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert printed == [
        "tokens 3 2.0 tokens/s",
        "prompt tokens 10 0.50 s",
        "rounds 3",
        "rows held 260 capacity 384",
        "rows evicted 129",
        "KV bytes 24.6 kB",
    ]


def test_a_request_that_cannot_be_served_prints_nothing_else(stub, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, FakeEngine(error=EngineError("budget 5 is too small")))
    assert main(["run", "b", "--prompt", "x", "--stats"]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "keysieve: error: budget 5 is too small\n")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_page_of_kept_tokens(form: list[str], stub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    engine, page = FakeEngine(), tmp_path / "kept.html"
    stub(FUNCTION, engine)
    base = ["run", "b", "--prompt", "x", *form, "--kept"]
    assert main([*base, str(page)]) == 2
    assert "b does not keep which tokens its rows are of" in capsys.readouterr().err
    engine.manifest["row_states"] = [{"name": "token"}]
    engine.counters.holders, engine.counters.heads = [[4, 4, 0, 2, 4]], 4  # the last token drawn was not read
    assert main([*base, str(page)]) == 0
    text = page.read_text()
    assert [f"&lt;{token}&gt;</span>" in text for token in (10, 11, 12, 5, 6, 7)] == [True] * 5 + [False]
    assert 'class="gone" title="token 2: held by 0 of 4 KV heads"' in text
    assert main([*base, str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    assert page.read_text() == text


def test_an_interrupt_ends_the_line(stub, capsys: pytest.CaptureFixture) -> None:
    stub(FUNCTION, FakeEngine(error=KeyboardInterrupt()))
    assert main(["run", "b", "--prompt", "x"]) == 130
    output = capsys.readouterr()
    assert (output.out, output.err) == ("Hi\n", "keysieve: interrupted\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-p", "1.5"], "top_p 1.5"),
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--chunk", "0"], "'0' is not a whole number"),
    ],
)
def test_options_that_cannot_work_are_2(options: list[str], message: str, stub, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, FakeEngine())
    assert main(["run", "b", "--prompt", "x", *options]) == 2
    assert message in capsys.readouterr().err
    assert not calls


def test_a_missing_prompt_file_is_1(stub, capsys: pytest.CaptureFixture) -> None:
    calls = stub(FUNCTION, FakeEngine())
    assert main(["run", "b", "--prompt", "@no.txt"]) == 1
    assert "cannot read the prompt file 'no.txt'" in capsys.readouterr().err
    assert not calls
