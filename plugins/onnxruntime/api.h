// The part of ONNX Runtime's C API that the library uses, declared from its documentation.
//
// The function table is append-only, so an entry's place never changes: OrtApi is read as an array of pointers. Neither
// the PyPI package nor most distributions bring the headers; with -DKEYSIEVE_ORT_HEADERS and their folder on the
// include path, check_api.cpp compares every place with the official ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace keysieve::ort {

// The oldest API with all of what is used here (ONNX Runtime 1.18); newer runtimes serve it too.
constexpr uint32_t kApiVersion = 18;

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct Domain;
struct SessionOptions;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

// Places in the function table.
enum Place : size_t {
    kCreateStatus = 0,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorTypeAndShape = 65,
    kGetAttributeFloat = 85,
    kGetAttributeInt64 = 86,
    kGetAttributeString = 87,
    kGetInputCount = 88,
    kGetInput = 90,
    kGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseShapeInfo = 99,
    kParallelFor = 274,
};

struct Api {
    void const* functions[kParallelFor + 1];

    template <typename... Arguments>
    Status* call(Place place, Arguments... arguments) const {
        return reinterpret_cast<Status* (*)(Arguments...)>(const_cast<void*>(functions[place]))(arguments...);
    }

    Status* error(ErrorCode code, char const* message) const { return call(kCreateStatus, code, message); }

    void release(Place place, void* object) const {
        reinterpret_cast<void (*)(void*)>(const_cast<void*>(functions[place]))(object);
    }
};

struct ApiBase {
    Api const* (*api)(uint32_t version);
    char const* (*version)();
};

// What a custom op tells ONNX Runtime; members in the order of its ABI, unused ones null.
struct CustomOp {
    uint32_t version = kApiVersion;
    void* (*createKernel)(CustomOp const*, Api const*, KernelInfo const*) = nullptr;
    char const* (*name)(CustomOp const*) = nullptr;
    char const* (*provider)(CustomOp const*) = nullptr;
    ElementType (*inputType)(CustomOp const*, size_t) = nullptr;
    size_t (*inputCount)(CustomOp const*) = nullptr;
    ElementType (*outputType)(CustomOp const*, size_t) = nullptr;
    size_t (*outputCount)(CustomOp const*) = nullptr;
    void (*compute)(void*, KernelContext*) = nullptr;
    void (*destroy)(void*) = nullptr;
    Characteristic (*inputCharacteristic)(CustomOp const*, size_t) = nullptr;
    Characteristic (*outputCharacteristic)(CustomOp const*, size_t) = nullptr;
    int (*inputMemory)(CustomOp const*, size_t) = nullptr;
    int (*variadicInputs)(CustomOp const*) = nullptr;
    int (*variadicInputsAlike)(CustomOp const*) = nullptr;
    int (*variadicOutputs)(CustomOp const*) = nullptr;
    int (*variadicOutputsAlike)(CustomOp const*) = nullptr;
    Status* (*createKernelV2)(CustomOp const*, Api const*, KernelInfo const*, void**) = nullptr;
    Status* (*computeV2)(void*, KernelContext*) = nullptr;
    void* inferShapes = nullptr;
    int (*startVersion)(CustomOp const*) = nullptr;
    int (*endVersion)(CustomOp const*) = nullptr;
    size_t (*mayInplace)(int**, int**) = nullptr;
    void (*releaseMayInplace)(int*, int*) = nullptr;
    size_t (*aliases)(int**, int**) = nullptr;
    void (*releaseAliases)(int*, int*) = nullptr;
};

} // namespace keysieve::ort
