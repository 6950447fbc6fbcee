// What the three plugins share: TensorRT's interfaces, and the boundary that turns exceptions into reports.
#pragma once

#include "abi.h"
#include "fields.h"
#include "nodes.h"

#include <memory>
#include <string>
#include <vector>

namespace keysieve {

constexpr char const* kNamespace = "";
constexpr char const* kLayerName = "layer_name"; // serialised beside the contract's attributes, for messages
constexpr int32_t kFailure = -1;

// Tell everyone who may listen: stderr, TensorRT's error recorder if there is one, and keysieve_last_error().
void report(nvinfer1::IErrorRecorder* recorder, nvinfer1::ErrorCode code, std::string const& message) noexcept;
char const* takeLastError() noexcept; // and forget it; valid until the thread's next call

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(char const* name, char const* version, std::string layerName)
        : name_(name), version_(version), layerName_(std::move(layerName)) {}

    // What a node is.
    virtual std::unique_ptr<Plugin> copy() const = 0;
    virtual Types inputTypes() const = 0;
    virtual Types outputTypes() const = 0;
    virtual void check(std::vector<Shape> const& inputs) const = 0;
    virtual void outputShapes(
        nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs* out, nvinfer1::IExprBuilder& builder) const
        = 0;
    virtual void run(std::vector<Shape> const& inputs, void const* const* in, void* const* out, void* workspace,
        Handle stream)
        = 0;
    virtual void attributes(Fields& fields) const = 0;
    virtual int32_t alias(int32_t) const { return -1; }
    virtual size_t workspace(std::vector<Shape> const&) const { return 0; }
    virtual void prepare() {} // load what enqueue needs; may be called more than once

    // TensorRT's side.
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    char const* getPluginName() const noexcept override { return name_; }
    char const* getPluginVersion() const noexcept override { return version_; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t outputs, nvinfer1::DataType const* inputTypes,
        int32_t inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const* shapeInputs,
        int32_t shapeInputCount, nvinfer1::DimsExprs* out, int32_t outputs,
        nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t inputs,
        int32_t outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
        nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override { return alias(output); }
    char const* getMetadataString() noexcept override { return layerName_.c_str(); }

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
        int32_t outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* inDesc, nvinfer1::PluginTensorDesc const* outDesc,
        void const* const* in, void* const* out, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

protected:
    Plugin(Plugin const& other) : name_(other.name_), version_(other.version_), layerName_(other.layerName_) {}

private:
    template <typename Body>
    bool guarded(nvinfer1::ErrorCode code, Body&& body) const noexcept;

    char const* name_;
    char const* version_;
    std::string layerName_;
    nvinfer1::IErrorRecorder* recorder_ = nullptr; // of the execution context; it outlives the plugin attached to it
    std::unique_ptr<Fields> serialised_;
};

// One creator; `Made` has `static void declare(Fields&)`, NAME, and a constructor (fields, layer name).
template <typename Made>
class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    Creator() {
        Made::declare(fields_);
        fields_.declare("plugin_version", nvinfer1::PluginFieldType::kCHAR);
    }

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase) noexcept override {
        std::string layer;
        try {
            layer = name == nullptr ? "" : name;
            if (fields == nullptr) {
                throw Error("no attributes given");
            }
            if (hasField(*fields, kLayerName)) {
                layer = textField(*fields, kLayerName);
            }
            if (hasField(*fields, "plugin_version") && textField(*fields, "plugin_version") != Made::VERSION) {
                throw Error("the node has plugin_version " + textField(*fields, "plugin_version")
                    + ", this library implements " + Made::VERSION + "; build the library and the model with the same keysieve");
            }
            return new Made(*fields, layer);
        } catch (std::exception const& error) {
            report(nullptr, nvinfer1::ErrorCode::kINVALID_ARGUMENT,
                std::string(Made::NAME) + " of layer '" + layer + "': " + error.what());
            return nullptr;
        }
    }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
    char const* getPluginName() const noexcept override { return Made::NAME; }
    char const* getPluginVersion() const noexcept override { return Made::VERSION; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Fields fields_;
};

nvinfer1::IPluginCreatorInterface* updateCreator();
nvinfer1::IPluginCreatorInterface* scoreCreator();
nvinfer1::IPluginCreatorInterface* selectCreator();

} // namespace keysieve
