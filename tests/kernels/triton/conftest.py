"""Lets these tests import their helper, and gives them the interpreter and a cache of built kernels."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("triton.language", reason="the GPU kernels need Triton")  # the folder itself is no `triton`


@pytest.fixture(scope="session")
def interpreted():
    """Runs a function of `keysieve.kernels.triton.launch` in Triton's interpreter: (name, model, **tensors)."""
    from interpreter import Interpreter

    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")
