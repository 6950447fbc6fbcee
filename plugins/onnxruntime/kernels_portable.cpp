#define KEYSIEVE_WIDTH 4
#define KEYSIEVE_NAME "portable"
#include "kernels.inc"

keysieve::Kernels const* keysieve::portableKernels() { return &table; }
