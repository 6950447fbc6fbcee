"""The GPU's form of the three operations, written in Triton; `kernels.reference` is what they must equal.

`score`, `select` and `update` hold one kernel file each, `variants` their specialisation for a model, `aot` the
build for GPUs that are not there, and `launch` runs them on tensors, on a GPU or in Triton's interpreter.
"""
