// The part of ONNX Runtime's C API that the library uses, declared from its documentation.
//
// The function table is append-only, so an entry's place never changes: OrtApi is read as an array of pointers. Neither
// the PyPI package nor most distributions bring the headers; where they are, this compares every place with theirs:
//     g++ -std=c++17 -fsyntax-only -DKEYSIEVE_ORT_HEADERS -I FOLDER library.cpp
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
enum ElementType : int { kFloat = 1, kUInt8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };

// Places in the function table.
enum Place : size_t {
    kCreateStatus = 0,
    kGetErrorMessage = 2,
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

#ifdef KEYSIEVE_ORT_HEADERS
#include <onnxruntime_c_api.h>

#define KEYSIEVE_PLACE(place, member) \
    static_assert(offsetof(OrtApi, member) == keysieve::ort::place * sizeof(void*), #member)
#define KEYSIEVE_MEMBER(ours, theirs) \
    static_assert(offsetof(keysieve::ort::CustomOp, ours) == offsetof(OrtCustomOp, theirs), #theirs)
KEYSIEVE_PLACE(kCreateStatus, CreateStatus);
KEYSIEVE_PLACE(kGetErrorMessage, GetErrorMessage);
KEYSIEVE_PLACE(kCreateCustomOpDomain, CreateCustomOpDomain);
KEYSIEVE_PLACE(kCustomOpDomainAdd, CustomOpDomain_Add);
KEYSIEVE_PLACE(kAddCustomOpDomain, AddCustomOpDomain);
KEYSIEVE_PLACE(kGetTensorMutableData, GetTensorMutableData);
KEYSIEVE_PLACE(kGetDimensionsCount, GetDimensionsCount);
KEYSIEVE_PLACE(kGetDimensions, GetDimensions);
KEYSIEVE_PLACE(kGetTensorTypeAndShape, GetTensorTypeAndShape);
KEYSIEVE_PLACE(kGetAttributeFloat, KernelInfoGetAttribute_float);
KEYSIEVE_PLACE(kGetAttributeInt64, KernelInfoGetAttribute_int64);
KEYSIEVE_PLACE(kGetAttributeString, KernelInfoGetAttribute_string);
KEYSIEVE_PLACE(kGetInputCount, KernelContext_GetInputCount);
KEYSIEVE_PLACE(kGetInput, KernelContext_GetInput);
KEYSIEVE_PLACE(kGetOutput, KernelContext_GetOutput);
KEYSIEVE_PLACE(kReleaseStatus, ReleaseStatus);
KEYSIEVE_PLACE(kReleaseShapeInfo, ReleaseTensorTypeAndShapeInfo);
KEYSIEVE_PLACE(kParallelFor, KernelContext_ParallelFor);
KEYSIEVE_MEMBER(inputMemory, GetInputMemoryType);
KEYSIEVE_MEMBER(createKernelV2, CreateKernelV2);
KEYSIEVE_MEMBER(computeV2, KernelComputeV2);
KEYSIEVE_MEMBER(releaseAliases, ReleaseAliasMap);
#endif
