#if defined(__x86_64__)
#include "kernels.h" // before the switch: its inline functions are those of every file

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif
#define KEYSIEVE_WIDTH 16
#define KEYSIEVE_NAME "avx512vnni"
#define KEYSIEVE_VNNI
#include "kernels.inc"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

keysieve::Kernels const* keysieve::avx512vnniKernels() { return &table; }
#else
#include "kernels.h"

keysieve::Kernels const* keysieve::avx512vnniKernels() { return nullptr; }
#endif
