#include "kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

namespace keysieve {

namespace {

bool has(Kernels const* kernels) {
    if (!kernels) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool const avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!std::strcmp(kernels->name, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (!std::strcmp(kernels->name, "avx512")) return avx512;
    if (!std::strcmp(kernels->name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); // these have f16c too
#endif
    return true;
}

// The fastest first; the last one is always there.
std::array<Kernels const*, 4> all() { return {avx512vnniKernels(), avx512Kernels(), avx2Kernels(), portableKernels()}; }

Kernels const* fastest() {
    auto const candidates = all();
    return *std::find_if(candidates.begin(), candidates.end(), has);
}

std::atomic<Kernels const*>& inUse() {
    static std::atomic<Kernels const*> current{fastest()};
    return current;
}

} // namespace

Kernels const& kernels() { return *inUse(); }

} // namespace keysieve

extern "C" {

// The instruction set in use.
__attribute__((visibility("default"))) char const* keysieve_instructions() { return keysieve::kernels().name; }

// Use another one; 0 if it was not compiled, or the processor lacks it.
__attribute__((visibility("default"))) int keysieve_use(char const* name) {
    for (keysieve::Kernels const* candidate : keysieve::all())
        if (candidate && !std::strcmp(candidate->name, name) && keysieve::has(candidate)) {
            keysieve::inUse() = candidate;
            return 1;
        }
    return 0;
}
}
