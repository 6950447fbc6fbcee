"""A plugin library with real kernels for one architecture, built once a session."""

from pathlib import Path

import pytest

from keysieve.kernels.triton.aot import build
from keysieve.kernels.triton.configuration import KernelConfiguration
from keysieve.plugins.tensorrt.build import build_library

MODEL = KernelConfiguration(
    layers=3, query_heads=4, kv_heads=2, head_dim=16, value_dim=24, rotary_dim=16, dtype="float16", sinks=2, recent=8
)


@pytest.fixture(scope="session")
def model() -> KernelConfiguration:
    return MODEL


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(MODEL, build(MODEL, (80,)), tmp_path_factory.mktemp("plugin") / "libkeysieve_tensorrt.so")
