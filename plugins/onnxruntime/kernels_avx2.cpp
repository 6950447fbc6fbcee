#if defined(__x86_64__)
#include "kernels.h" // before the switch: its inline functions are those of every file

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define KEYSIEVE_WIDTH 8
#define KEYSIEVE_NAME "avx2"
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

keysieve::Kernels const* keysieve::avx2Kernels() { return &table; }
#else
#include "kernels.h"

keysieve::Kernels const* keysieve::avx2Kernels() { return nullptr; }
#endif
