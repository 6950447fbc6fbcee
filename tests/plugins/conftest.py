"""The custom-op library on every instruction set that it was written for."""

import ctypes

import pytest

from keysieve.plugins.onnxruntime.build import find_library

INSTRUCTIONS = ("avx512vnni", "avx512", "avx2", "portable")


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    """The library runs on this instruction set."""
    library = ctypes.CDLL(str(find_library()))
    library.keysieve_instructions.restype = ctypes.c_char_p
    before = library.keysieve_instructions()
    if not library.keysieve_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.keysieve_use(before)
