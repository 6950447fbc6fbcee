"""Lets these tests import their helper, and gives them a way to run kernels and a cache of built ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("triton.language", reason="the GPU kernels need Triton")  # the folder itself is no `triton`


@pytest.fixture(scope="session", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """Runs a function of `keysieve.kernels.triton.launch`: call it with (name, model, **tensors)."""
    from runners import Interpreter, on_gpu

    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch can use")
        yield on_gpu
        return
    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")
