"""The ONNX Runtime carrier: a library of custom ops in C++, for CPUs."""
