"""The contestants of benchmarks/cpu.py: one module each, run as `python -m contestants.NAME` by its own Python."""
