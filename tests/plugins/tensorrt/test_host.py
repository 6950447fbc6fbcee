"""Runs the C++ unit tests of the host side, with address and undefined-behaviour sanitisers."""

import subprocess
from pathlib import Path

import pytest

from keysieve.plugins.cxx import find_compiler
from keysieve.plugins.tensorrt.build import SOURCES

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("aliased", [1, 0])
def test_host_side_in_cpp(aliased: int, tmp_path: Path) -> None:
    program = tmp_path / "host_test"
    sources = [HERE / "host_test.cpp", *(file for file in SOURCES.glob("*.cpp") if file.name != "library.cpp")]
    flags = ["-std=c++17", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover", "-Wall", "-Wextra", "-Werror"]
    command = [find_compiler(), *flags, f"-DKEYSIEVE_TEST_ALIASED={aliased}", *map(str, sources)]
    subprocess.run([*command, "-o", str(program), "-ldl", "-lpthread"], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
