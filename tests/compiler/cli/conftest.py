"""Stand-ins for the functions behind the verbs, which record how they were called."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from keysieve.compiler.config import EvictionConfig, PolicyConfig

Stub = Callable[..., list[tuple[tuple, dict[str, Any]]]]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """stub("calibrate.calibrate", result) replaces that function; returns the list of its (args, kwargs)."""

    def replace(name: str, result: Any) -> list[tuple[tuple, dict[str, Any]]]:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setattr(f"keysieve.compiler.{name}", function)
        return calls

    return replace


@pytest.fixture
def report() -> Callable[..., Any]:
    """report(("half_split", None), (None, "why"), ...): a report on layers with that RoPE form, or that miss reason."""
    from keysieve.compiler.inspect import LayerReport, Report

    def make(*layers: tuple[str | None, str | None], nodes: dict[str, int] | None = None) -> Report:
        entries = [
            LayerReport(index, "unsupported" if reason else "full", form, reason is None, reason, f"node_{index}")
            for index, (form, reason) in enumerate(layers)
        ]
        eviction = asdict(EvictionConfig(PolicyConfig("triattention"), budget=256))
        return Report("SomeForCausalLM", entries, 1000, 256, 384_000, "float32", nodes or {}, eviction)

    return make
