"""The check of everything that needs an NVIDIA GPU; `python benchmarks/gpu/run.py --help`."""
