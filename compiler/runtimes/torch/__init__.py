"""torch, on an NVIDIA GPU or a CPU: the program of `export.torch`, with caches and state in place."""

from keysieve.compiler.runtimes.torch.runtime import TorchRuntime, open_runtime

__all__ = ["TorchRuntime", "open_runtime"]
