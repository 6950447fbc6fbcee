// The CUDA driver's functions that the plugins call, found at run time: the library itself loads without a driver.
#pragma once

#include "error.h"

#include <cstddef>
#include <cstdint>

namespace keysieve {

// Types of cuda.h, whose binary interface is fixed, under names of our own.
using Status = int; // CUresult
using DevicePointer = uint64_t;
using Handle = void*; // CUlibrary, CUkernel, CUfunction, CUstream

struct Driver {
    Status (*init)(unsigned flags);
    Status (*currentDevice)(int* device);
    Status (*deviceAttribute)(int* value, int attribute, int device);
    Status (*libraryLoadData)(Handle* library, void const* code, void* jitOptions, void** jitValues, unsigned jitCount,
        void* options, void** values, unsigned count);
    Status (*libraryGetKernel)(Handle* kernel, Handle library, char const* name);
    Status (*launch)(Handle kernel, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY,
        unsigned blockZ, unsigned sharedBytes, Handle stream, void** parameters, void** extra);
    Status (*copyToDevice)(DevicePointer to, void const* from, size_t bytes, Handle stream);
    Status (*copyOnDevice)(DevicePointer to, DevicePointer from, size_t bytes, Handle stream);
    Status (*isCapturing)(Handle stream, int* status);
    Status (*allocate)(DevicePointer* memory, size_t bytes);
    Status (*free)(DevicePointer memory);
    Status (*errorName)(Status status, char const** name);
    Status (*errorText)(Status status, char const** text);
};

constexpr Status kSuccess = 0;
constexpr Status kInvalidImage = 200;
constexpr Status kNoBinaryForGpu = 209;
constexpr Status kUnsupportedPtx = 222;

// The machine's driver, opened on the first call. Throws Error where there is none or it is too old.
Driver const& driver();

// Put another in its place (tests); nullptr: the machine's again.
void replaceDriver(Driver const* replacement);

// Throw Error "<what>: CUDA_ERROR_... (text)" unless status is success.
void check(Status status, char const* what);

// Architecture of the current device: 86 for compute capability 8.6.
int currentArchitecture();

} // namespace keysieve
