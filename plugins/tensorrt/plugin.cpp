#include "plugin.h"

#include <cstdio>
#include <mutex>

namespace keysieve {
namespace {

using nvinfer1::DataType;
using nvinfer1::ErrorCode;

constexpr size_t kRecorderLimit = 127; // characters that an error recorder keeps
std::mutex mutex_;
std::string last_;

Shape shapeOf(nvinfer1::Dims const& dims) { return Shape(dims.d, dims.d + dims.nbDims); }

template <typename Description, typename Select>
std::vector<Shape> shapesOf(Description const* descriptions, int32_t count, Select select) {
    std::vector<Shape> shapes;
    for (int32_t i = 0; i < count; ++i) {
        shapes.push_back(shapeOf(select(descriptions[i])));
    }
    return shapes;
}

} // namespace

void report(nvinfer1::IErrorRecorder* recorder, ErrorCode code, std::string const& message) noexcept {
    try {
        std::fprintf(stderr, "keysieve: %s\n", message.c_str());
        if (recorder != nullptr) {
            recorder->reportError(code, message.substr(0, kRecorderLimit).c_str());
        }
        std::lock_guard<std::mutex> const lock(mutex_);
        last_ = message;
    } catch (std::exception const&) {
        // Out of memory while reporting; the failure code still reaches TensorRT.
    }
}

char const* takeLastError() noexcept {
    std::lock_guard<std::mutex> const lock(mutex_);
    static thread_local char text[1024];
    std::snprintf(text, sizeof(text), "%s", last_.c_str());
    last_.clear();
    return text;
}

template <typename Body>
bool Plugin::guarded(ErrorCode code, Body&& body) const noexcept {
    try {
        body();
        return true;
    } catch (std::exception const& error) {
        report(recorder_, code, std::string(name_) + " of layer '" + layerName_ + "': " + error.what());
        return false;
    }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
    std::unique_ptr<Plugin> made;
    guarded(ErrorCode::kINVALID_ARGUMENT, [&] { made = copy(); });
    return made.release();
}

int32_t Plugin::getNbOutputs() const noexcept {
    int32_t count = kFailure;
    guarded(ErrorCode::kINVALID_ARGUMENT, [&] { count = static_cast<int32_t>(outputTypes().size()); });
    return count;
}

int32_t Plugin::getOutputDataTypes(
    DataType* types, int32_t outputs, DataType const*, int32_t inputs) const noexcept {
    bool const ok = guarded(ErrorCode::kINVALID_ARGUMENT, [&] {
        Types const expected = outputTypes();
        if (static_cast<size_t>(outputs) != expected.size() || static_cast<size_t>(inputs) != inputTypes().size()) {
            throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs)
                + " outputs, this library needs " + std::to_string(inputTypes().size()) + " and "
                + std::to_string(expected.size()) + "; build the plugin library from the same bundle");
        }
        std::copy(expected.begin(), expected.end(), types);
    });
    return ok ? 0 : kFailure;
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
    nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder& builder) noexcept {
    return guarded(ErrorCode::kINVALID_ARGUMENT, [&] { outputShapes(in, inputs, out, builder); }) ? 0 : kFailure;
}

bool Plugin::supportsFormatCombination(
    int32_t position, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t inputs, int32_t) noexcept {
    bool supported = false;
    guarded(ErrorCode::kINVALID_ARGUMENT, [&] {
        Types types = inputTypes();
        if (static_cast<size_t>(inputs) != types.size()) {
            return;
        }
        Types const outputs = outputTypes();
        types.insert(types.end(), outputs.begin(), outputs.end());
        nvinfer1::PluginTensorDesc const& asked = inOut[position].desc;
        supported = asked.format == nvinfer1::TensorFormat::kLINEAR && asked.type == types.at(static_cast<size_t>(position));
    });
    return supported;
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
    bool const ok = guarded(ErrorCode::kINVALID_ARGUMENT, [&] {
        check(shapesOf(in, inputs, [](auto const& tensor) { return tensor.desc.dims; }));
        check(shapesOf(in, inputs, [](auto const& tensor) { return tensor.max; }));
    });
    return ok ? 0 : kFailure;
}

size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
    size_t bytes = 0;
    guarded(ErrorCode::kINVALID_ARGUMENT,
        [&] { bytes = workspace(shapesOf(in, inputs, [](auto const& tensor) { return tensor.max; })); });
    return bytes;
}

int32_t Plugin::onShapeChange(
    nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const*, int32_t) noexcept {
    bool const ok = guarded(ErrorCode::kINVALID_ARGUMENT,
        [&] { check(shapesOf(in, inputs, [](auto const& tensor) { return tensor.dims; })); });
    return ok ? 0 : kFailure;
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* inDesc, nvinfer1::PluginTensorDesc const*,
    void const* const* in, void* const* out, void* workspace, cudaStream_t stream) noexcept {
    bool const ok = guarded(ErrorCode::kFAILED_EXECUTION, [&] {
        auto const inputs = static_cast<int32_t>(inputTypes().size());
        run(shapesOf(inDesc, inputs, [](auto const& tensor) { return tensor.dims; }), in, out, workspace, stream);
    });
    return ok ? 0 : kFailure;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
    std::unique_ptr<Plugin> made;
    nvinfer1::IErrorRecorder* const recorder = context == nullptr ? nullptr : context->getErrorRecorder();
    bool const ok = guarded(ErrorCode::kFAILED_EXECUTION, [&] {
        made = copy();
        made->recorder_ = recorder;
        try {
            made->prepare(); // now, since a stream that captures a CUDA graph may not load
        } catch (Error const&) {
            // An engine may be built where no GPU is; enqueue prepares again, and reports.
        }
    });
    return ok ? made.release() : nullptr;
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
    bool const ok = guarded(ErrorCode::kINVALID_ARGUMENT, [&] {
        serialised_ = std::make_unique<Fields>();
        attributes(*serialised_);
        serialised_->add("plugin_version", std::string(version_));
        serialised_->add(kLayerName, layerName_);
    });
    return ok ? serialised_->collection() : nullptr;
}

} // namespace keysieve
