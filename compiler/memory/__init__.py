"""What an engine still knows after eviction: tasks made from a seed, and the run that counts right answers.

`remember` is imported on first use, so that the command line knows the tasks without loading an engine.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keysieve.compiler.memory.runner import remember

__all__ = ["remember"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'keysieve.compiler.memory' has no attribute {name!r}")
    from keysieve.compiler.memory import runner

    return runner.remember
