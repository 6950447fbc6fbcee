"""What every test shares: no network, few threads, fixed seeds, and the real model for the slow ones."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

MODEL = Path(__file__).parents[1] / "build" / "model" / "SmolLM2-135M-Instruct"

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


SLOWEST = ("test_smollm2.py", "test_session.py", "test_families.py", "test_engine.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files go first, so that two processes end at about the same time."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are tiny: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models and bundles of all test files lie."""
    return tmp_path_factory.getbasetemp() / "tiny"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct; without it the test fails, since a skip would hide that."""
    if not (MODEL / "config.json").is_file():
        pytest.fail("the model of the slow tests is not there; run `make model`", pytrace=False)
    return MODEL
