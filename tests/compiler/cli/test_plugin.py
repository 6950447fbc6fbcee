"""keysieve plugin build: what reaches the build, and where the library goes."""

from pathlib import Path

import pytest

from keysieve.compiler.cli import main
from keysieve.compiler.config import TensorRTConfig


@pytest.fixture
def built(stub, monkeypatch: pytest.MonkeyPatch):
    """Calls of the build; bundle and its ONNX file are stand-ins."""
    stub("bundle.open_bundle", type("Bundle", (), {"model": Path("model.onnx")})())
    monkeypatch.setattr("keysieve.plugins.tensorrt.configuration.read_configuration", lambda model: ("of", model))
    return stub("tensorrt.write_library", None)


def test_defaults(built, capsys: pytest.CaptureFixture) -> None:
    assert main(["plugin", "build", "DIR"]) == 0
    ((configuration, options, output, progress), _) = built[0]
    assert configuration == ("of", Path("model.onnx"))
    assert (options, output, progress.quiet) == (TensorRTConfig(), Path("libkeysieve_tensorrt.so"), False)
    assert capsys.readouterr().out == "libkeysieve_tensorrt.so\n"


def test_every_option(built) -> None:
    options = "--arch 90,100 --aliased --tensorrt-include headers -o x.so --quiet"
    assert main(["plugin", "build", "DIR", *options.split()]) == 0
    ((_, options, output, progress), _) = built[0]
    assert options == TensorRTConfig((90, 100), aliased=True, include=Path("headers"))
    assert (output, progress.quiet) == (Path("x.so"), True)


def test_custom_ops(built, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "keysieve.plugins.onnxruntime.build.build_library", lambda output: made.append(output) or Path("found/here.so")
    )
    assert main(["plugin", "build", "--ort"]) == main(["plugin", "build", "--ort", "-o", "x.so", "--quiet"]) == 0
    assert made == [None, Path("x.so")] and not built
    assert capsys.readouterr().out == "found/here.so\n" * 2


@pytest.mark.parametrize(
    "options", ["", "remove DIR", "build", "build DIR --arch 8x", "build DIR --ort", "build --ort --arch 90"]
)
def test_wrong_usage_is_2(options: str) -> None:
    assert main(["plugin", *options.split()]) == 2


def test_no_bundle_is_1(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["plugin", "build", str(tmp_path / "none")]) == 1
    assert "no bundle at" in capsys.readouterr().err
