"""keysieve compiles HuggingFace decoders into engines that keep their own KV cache inside a budget.

Every name below is imported on first use, so that `import keysieve` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keysieve.version import __version__

if TYPE_CHECKING:
    from keysieve.compiler.calibrate import calibrate
    from keysieve.compiler.compare import compare
    from keysieve.compiler.compile import compile
    from keysieve.compiler.config import CompileConfig, EvictionConfig, PolicyConfig
    from keysieve.compiler.doctor import doctor
    from keysieve.compiler.engine import load
    from keysieve.compiler.inspect import inspect
    from keysieve.compiler.memory import remember
    from keysieve.compiler.models import models
    from keysieve.compiler.statistics_report import statistics_report
    from keysieve.errors import (
        BundleError,
        CaptureError,
        ConfigError,
        EngineError,
        ExportError,
        KeySieveError,
        MatchError,
        StatisticsError,
    )

__all__ = [
    "__version__",
    # the verbs
    "calibrate",
    "compile",
    "load",
    "inspect",
    "models",
    "compare",
    "remember",
    "doctor",
    "statistics_report",
    # their options
    "PolicyConfig",
    "EvictionConfig",
    "CompileConfig",
    # what they raise
    "KeySieveError",
    "ConfigError",
    "CaptureError",
    "MatchError",
    "StatisticsError",
    "ExportError",
    "BundleError",
    "EngineError",
]

_HOMES = {
    "calibrate": "keysieve.compiler.calibrate",
    "compile": "keysieve.compiler.compile",
    "load": "keysieve.compiler.engine",
    "inspect": "keysieve.compiler.inspect",
    "models": "keysieve.compiler.models",
    "compare": "keysieve.compiler.compare",
    "remember": "keysieve.compiler.memory",
    "doctor": "keysieve.compiler.doctor",
    "statistics_report": "keysieve.compiler.statistics_report",
    "PolicyConfig": "keysieve.compiler.config",
    "EvictionConfig": "keysieve.compiler.config",
    "CompileConfig": "keysieve.compiler.config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'keysieve' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "keysieve.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
