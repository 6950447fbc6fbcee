// The part of TensorRT's plugin interface that the plugins implement or call.
//
// With KEYSIEVE_TENSORRT_HEADERS the official headers declare it. Otherwise the declarations below do: no package
// registry carries the headers, and a plugin needs no symbol of the library, only the same virtual tables and structs.
// Order and types are the binary interface of TensorRT 10 and 11 and of TensorRT-RTX 1.x; the checks at the end hold
// for both ways.
#pragma once

#ifdef KEYSIEVE_TENSORRT_HEADERS
#include <NvInferRuntime.h>
#else

#include <cstddef>
#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t {
    kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kFP8 = 6, kBF16 = 7, kINT64 = 8
};
enum class TensorFormat : int32_t { kLINEAR = 0 };
enum class PluginFieldType : int32_t {
    kFLOAT16 = 0, kFLOAT32 = 1, kFLOAT64 = 2, kINT8 = 3, kINT16 = 4, kINT32 = 5, kCHAR = 6, kDIMS = 7, kUNKNOWN = 8,
    kBF16 = 9, kINT64 = 10
};
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class APILanguage : int32_t { kCPP = 0, kPYTHON = 1 };
enum class DimensionOperation : int32_t { kSUM = 0, kPROD = 1 };
enum class ErrorCode : int32_t { kINVALID_ARGUMENT = 3, kFAILED_EXECUTION = 7 };

struct Dims64 {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

struct InterfaceInfo {
    char const* kind;
    int32_t major;
    int32_t minor;
};

struct PluginField {
    AsciiChar const* name = nullptr;
    void const* data = nullptr;
    PluginFieldType type = PluginFieldType::kUNKNOWN;
    int32_t length = 0;
};

struct PluginFieldCollection {
    int32_t nbFields = 0;
    PluginField const* fields = nullptr;
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min;
    Dims max;
    Dims opt;
};

class IVersionedInterface {
public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

class IErrorRecorder : public IVersionedInterface {
public:
    virtual int32_t getNbErrors() const noexcept = 0;
    virtual ErrorCode getErrorCode(int32_t index) const noexcept = 0;
    virtual char const* getErrorDesc(int32_t index) const noexcept = 0;
    virtual bool hasOverflowed() const noexcept = 0;
    virtual void clear() noexcept = 0;
    virtual bool reportError(ErrorCode code, char const* description) noexcept = 0;
};

class IGpuAllocator;

class IPluginResourceContext {
public:
    virtual IGpuAllocator* getGpuAllocator() const noexcept = 0;
    virtual IErrorRecorder* getErrorRecorder() const noexcept = 0;
    virtual ~IPluginResourceContext() noexcept = default;
};

// A size as TensorRT computes with it. The plugins only pass pointers to it on, and ask for constants.
class IDimensionExpr;

// What an IExprBuilder forwards to, and where it keeps it.
class ExprBuilderTable {
public:
    virtual ~ExprBuilderTable() noexcept = default;
    virtual IDimensionExpr const* constant(int64_t value) = 0;
};

class IExprBuilder {
public:
    IDimensionExpr const* constant(int64_t value) noexcept { return table_->constant(value); }

protected:
    explicit IExprBuilder(ExprBuilderTable* table) : table_(table) {}
    virtual ~IExprBuilder() noexcept = default;
    ExprBuilderTable* table_;
};

struct DimsExprs {
    int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuildV2 : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 2, 0}; }
    virtual int32_t configurePlugin(
        DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out, int32_t outputs) noexcept
        = 0;
    virtual int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t outputs, DataType const* inputTypes, int32_t inputs) const noexcept
        = 0;
    virtual int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const* shapeInputs,
        int32_t shapeInputCount, DimsExprs* out, int32_t outputs, IExprBuilder& builder) noexcept
        = 0;
    virtual bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* inOut, int32_t inputs, int32_t outputs) noexcept
        = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept { return 0; }
    virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
    virtual int32_t getNbTactics() noexcept { return 0; }
    virtual char const* getTimingCacheID() noexcept { return nullptr; }
    virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
    virtual char const* getMetadataString() noexcept { return nullptr; }
    virtual int32_t getAliasedInput(int32_t) noexcept { return -1; }
};

class IPluginV3OneRuntime : public IPluginCapability {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
    virtual int32_t setTactic(int32_t) noexcept { return 0; }
    virtual int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) noexcept
        = 0;
    virtual int32_t enqueue(PluginTensorDesc const* inDesc, PluginTensorDesc const* outDesc, void const* const* in,
        void* const* out, void* workspace, cudaStream_t stream) noexcept
        = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
    virtual IPluginV3* createPlugin(
        AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept
        = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class ILoggerFinder;

} // namespace nvinfer1

#endif // KEYSIEVE_TENSORRT_HEADERS

static_assert(sizeof(nvinfer1::Dims) == 72);
static_assert(sizeof(nvinfer1::DimsExprs) == 72);
static_assert(sizeof(nvinfer1::PluginField) == 24 && offsetof(nvinfer1::PluginField, length) == 20);
static_assert(sizeof(nvinfer1::PluginFieldCollection) == 16);
static_assert(sizeof(nvinfer1::PluginTensorDesc) == 88 && offsetof(nvinfer1::PluginTensorDesc, type) == 72);
static_assert(sizeof(nvinfer1::DynamicPluginTensorDesc) == 304 && offsetof(nvinfer1::DynamicPluginTensorDesc, min) == 88);
static_assert(sizeof(nvinfer1::InterfaceInfo) == 16);
static_assert(sizeof(nvinfer1::IVersionedInterface) == sizeof(void*));
static_assert(sizeof(nvinfer1::IExprBuilder) == 2 * sizeof(void*));
static_assert(sizeof(nvinfer1::DataType) == 4 && static_cast<int>(nvinfer1::DataType::kINT64) == 8);
static_assert(static_cast<int>(nvinfer1::DataType::kBF16) == 7 && static_cast<int>(nvinfer1::DataType::kHALF) == 1);
static_assert(static_cast<int>(nvinfer1::PluginFieldType::kINT32) == 5);
static_assert(static_cast<int>(nvinfer1::PluginFieldType::kCHAR) == 6);
