// KeySieveSelect: scores to a plan of kept rows, for the sequences that are due. It takes no utility yet.

#include "plugin.h"

namespace keysieve {
namespace {

class Select final : public Plugin {
public:
    static constexpr char const* NAME = "KeySieveSelect";
    static constexpr char const* VERSION = "2"; // of the contract

    Select(nvinfer1::PluginFieldCollection const& fields, std::string layerName)
        : Plugin(NAME, VERSION, std::move(layerName)),
          scope_(textField(fields, "scope")),
          kvHeads_(integerField(fields, "kv_heads")),
          sinks_(integerField(fields, "sinks")),
          recent_(integerField(fields, "recent")) {
        if (scope_ != "per_layer_per_head" && scope_ != "per_head" && scope_ != "union") {
            throw Error("attribute scope is '" + scope_ + "'; it must be per_layer_per_head, per_head or union");
        }
    }

    static void declare(Fields& fields) {
        fields.declare("scope", nvinfer1::PluginFieldType::kCHAR);
        fields.declare("kv_heads", nvinfer1::PluginFieldType::kINT32);
        fields.declare("sinks", nvinfer1::PluginFieldType::kINT32);
        fields.declare("recent", nvinfer1::PluginFieldType::kINT32);
    }

    std::unique_ptr<Plugin> copy() const override { return std::make_unique<Select>(*this); }
    Types inputTypes() const override { return select::inputTypes(); }
    Types outputTypes() const override { return Types(select::kOutputs, nvinfer1::DataType::kINT32); }

    void check(std::vector<Shape> const& inputs) const override {
        select::check(configuration, inputs, scope_, kvHeads_, sinks_, recent_);
    }

    void attributes(Fields& fields) const override {
        fields.add("scope", scope_);
        fields.add("kv_heads", kvHeads_);
        fields.add("sinks", sinks_);
        fields.add("recent", recent_);
    }

    void prepare() override {
        if (configuration.needsStats()) {
            loadKernel("select_stats");
        }
        loadKernel("select_plan");
    }

    size_t workspace(std::vector<Shape> const& inputs) const override {
        Shape const& scores = inputs.at(select::kScores);
        return select::workspaceBytes(configuration, scores.at(1), scores.at(3));
    }

    void outputShapes(nvinfer1::DimsExprs const* in, int32_t, nvinfer1::DimsExprs* out,
        nvinfer1::IExprBuilder& builder) const override {
        nvinfer1::DimsExprs const& scores = in[select::kScores];
        nvinfer1::DimsExprs& plan = out[select::kPlan];
        plan.nbDims = 4;
        plan.d[0] = scope_ == "per_layer_per_head" ? scores.d[0] : builder.constant(1);
        plan.d[1] = scores.d[1];
        plan.d[2] = builder.constant(scope_ == "union" ? 1 : kvHeads_);
        plan.d[3] = scores.d[3];
        for (int32_t output : {select::kKeep, select::kEvicted}) {
            out[output].nbDims = 1;
            out[output].d[0] = scores.d[1];
        }
    }

    void run(std::vector<Shape> const& inputs, void const* const* in, void* const* out, void* workspace,
        Handle stream) override {
        for (Launch& work : select::launches(configuration, inputs, in, out, workspace)) {
            launch(std::move(work), stream);
        }
    }

private:
    std::string scope_;
    int32_t kvHeads_;
    int32_t sinks_;
    int32_t recent_;
};

} // namespace

nvinfer1::IPluginCreatorInterface* selectCreator() {
    static Creator<Select> creator;
    return &creator;
}

} // namespace keysieve
