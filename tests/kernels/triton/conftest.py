"""A way to run kernels, and a cache of built ones."""

import pytest
import torch

from support.kernel_runners import Interpreter, on_gpu


@pytest.fixture(scope="session", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """Runs a function of `keysieve.kernels.triton.launch`: call it with (name, **arguments)."""
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
