"""A small interpreter of the PTX that Triton emits: it runs kernels on the CPU and reports what they do wrong."""

from .machine import Array, Device, Report
from .parse import Kernel, PtxError, parse

__all__ = ["Array", "Device", "Kernel", "PtxError", "Report", "parse"]
