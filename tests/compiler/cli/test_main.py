"""Exit codes, where output goes, and a start without heavy imports."""

import subprocess
import sys
import time
import warnings

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.cli.parser import VERBS
from keysieve.errors import BundleError

DOCTOR = "doctor.doctor"


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_is_light_and_fast(arguments: list[str]) -> None:
    script = (
        "import sys; from keysieve.compiler.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{code} {sorted(heavy)}' if code or heavy else 0)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: keysieve" in result.stdout
    assert seconds < 10  # under one on an idle machine


@pytest.mark.parametrize("arguments", [[], ["no-such-verb"], ["run", "DIR"], ["doctor", "--jso"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "error:" in output.err


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("keysieve ")


def test_an_error_is_one_line_and_1(stub, capsys: pytest.CaptureFixture) -> None:
    stub(DOCTOR, BundleError("file x is bad; do y"))
    assert main(["doctor"]) == 1
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "keysieve: error: file x is bad; do y\n")


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], stub, capsys: pytest.CaptureFixture) -> None:
    stub(DOCTOR, BundleError("file x is bad"))
    assert main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_in_keysieve_itself_is_not_hidden(stub) -> None:
    stub(DOCTOR, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_an_error_of_the_system_names_the_file(stub, capsys: pytest.CaptureFixture) -> None:
    stub(DOCTOR, PermissionError(13, "Permission denied", "secret.json"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "keysieve: error: secret.json: Permission denied\n"


def test_interrupt_is_130(stub, capsys: pytest.CaptureFixture) -> None:
    stub(DOCTOR, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "keysieve: interrupted\n"


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    script = (
        "import sys; from keysieve.compiler.cli import main; sys.stdin.read(); sys.exit(main(['doctor', '--json']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_own_warnings_are_lines_and_those_of_libraries_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def warn() -> dict:
        warnings.warn_explicit("few tokens", UserWarning, "text.py", 1, module="keysieve.compiler.progress")
        warnings.warn_explicit("old torchvision", UserWarning, "image.py", 1, module="torchvision.image")
        raise BundleError("done")

    monkeypatch.setattr("keysieve.compiler.doctor.doctor", warn)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "keysieve: warning: few tokens\nkeysieve: error: done\n"
