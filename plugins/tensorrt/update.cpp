// KeySieveUpdate: compact one layer's cache by the plan of the last step, then append the new rows; in place.
//
// A library built with `aliased` tells TensorRT so, which then runs the node on its own, between two compiled graphs.
// Without, the node is an ordinary one inside one graph, and the caller makes it work in place by binding input and output
// to one buffer; where they are two, the cache is copied first.

#include "plugin.h"

namespace keysieve {
namespace {

class Update final : public Plugin {
public:
    static constexpr char const* NAME = "KeySieveUpdate";
    static constexpr char const* VERSION = "1"; // of the contract

    Update(nvinfer1::PluginFieldCollection const& fields, std::string layerName)
        : Plugin(NAME, VERSION, std::move(layerName)), layer_(integerField(fields, "layer")) {}

    static void declare(Fields& fields) { fields.declare("layer", nvinfer1::PluginFieldType::kINT32); }

    std::unique_ptr<Plugin> copy() const override { return std::make_unique<Update>(*this); }
    Types inputTypes() const override { return update::inputTypes(configuration); }
    Types outputTypes() const override { return {configuration.cacheType, configuration.cacheType}; }
    int32_t alias(int32_t output) const override { return configuration.aliased != 0 ? update::aliasedInput(output) : -1; }
    void check(std::vector<Shape> const& inputs) const override { update::check(configuration, inputs, layer_); }
    void attributes(Fields& fields) const override { fields.add("layer", layer_); }
    void prepare() override { loadKernel("update"); }

    void outputShapes(nvinfer1::DimsExprs const* in, int32_t, nvinfer1::DimsExprs* out,
        nvinfer1::IExprBuilder&) const override {
        for (int32_t output = 0; output < update::kOutputs; ++output) {
            out[output] = in[update::aliasedInput(output)];
        }
    }

    void run(std::vector<Shape> const& inputs, void const* const* in, void* const* out, void*, Handle stream) override {
        for (int32_t output = 0; output < update::kOutputs; ++output) {
            int32_t const input = update::aliasedInput(output);
            if (out[output] == in[input]) {
                continue;
            }
            if (configuration.aliased != 0) {
                throw Error("the cache's input and output are different buffers; build the engine with the preview feature "
                            "ALIASED_PLUGIN_IO_10_03 and bind both names to one buffer");
            }
            keysieve::check(driver().copyOnDevice(address(out[output]), address(in[input]),
                                update::cacheBytes(configuration, inputs[static_cast<size_t>(input)]), stream),
                "cuMemcpyDtoDAsync");
        }
        launch(update::launch(inputs, in, out, layer_), stream);
    }

private:
    static DevicePointer address(void const* memory) { return reinterpret_cast<uintptr_t>(memory); }

    int32_t layer_;
};

} // namespace

nvinfer1::IPluginCreatorInterface* updateCreator() {
    static Creator<Update> creator;
    return &creator;
}

} // namespace keysieve
