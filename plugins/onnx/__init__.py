"""The ONNX carrier: nodes, schemas and function bodies of the three eviction ops."""
