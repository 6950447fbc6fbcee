"""What an engine still knows after eviction: tasks made from a seed, and the run that counts right answers."""

from keysieve.compiler.memory.runner import remember

__all__ = ["remember"]
