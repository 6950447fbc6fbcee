"""The TensorRT carrier: IPluginV3 plugins in C++ with the kernels embedded, their build, and their Python twin."""
