"""Values of options: numbers, prompts and output files."""

import io
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from keysieve.compiler.cli.arguments import natural, output_file, positive, positive_list, prompt_text
from keysieve.compiler.cli.terminal import UsageError, human_bytes, table
from keysieve.errors import ConfigError


def test_numbers() -> None:
    assert (positive("1"), natural("0"), positive_list("256,512,256")) == (1, 0, [256, 512])


@pytest.mark.parametrize(
    ("kind", "text"),
    [(positive, "0"), (positive, "-3"), (positive, "x"), (natural, "-1"), (positive_list, "1,"), (positive_list, "")],
)
def test_numbers_that_are_none(kind, text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="whole number of at least"):
        kind(text)


def test_a_prompt_is_text_a_file_or_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines \n\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("früh\n".encode())))
    assert prompt_text("as it is ") == "as it is "
    assert prompt_text(f"@{file}") == "two\nlines \n"  # only the last newline goes
    assert prompt_text("-") == "früh"


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"cannot read the prompt file 'no\.txt': No such file"):
        prompt_text("@no.txt")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prompt_text(f"@{tmp_path / 'latin1'}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prompt_text("caf\udce9")


def test_an_output_that_cannot_be_a_file_is_refused_first(tmp_path: Path) -> None:
    assert output_file(tmp_path / "new.json") == tmp_path / "new.json"
    with pytest.raises(UsageError, match="is a folder"):
        output_file(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        output_file(tmp_path / "missing" / "new.json")


def test_tables_and_sizes() -> None:
    assert table([("a", "1"), ("bcd", "22")], right=[1]) == "a     1\nbcd  22"
    assert [human_bytes(n) for n in (0, 999, 24576, 17_694_720, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "24.6 kB",
        "17.7 MB",
        "5000.0 GB",
    ]
