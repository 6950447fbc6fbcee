// KeySieveScore: rate every cached row of every layer with one launch, which leaves at once if nothing is due.

#include "plugin.h"

#include <algorithm>

namespace keysieve {
namespace {

// Where the key caches are, as an array on the device. TensorRT hands their addresses over with every enqueue, but they
// change only if buffers are bound anew, so an array is kept per set of addresses: a step copies nothing, and a
// captured CUDA graph goes on reading the array that belongs to its own buffers.
class KeyTables {
public:
    KeyTables() = default;
    KeyTables(KeyTables const&) = delete;
    KeyTables& operator=(KeyTables const&) = delete;
    ~KeyTables() {
        if (memory_ != 0) {
            driver().free(memory_);
        }
    }

    void allocate(size_t layers) {
        if (memory_ != 0) {
            return;
        }
        layers_ = layers;
        tables_.reserve(kTables); // addresses stay: a captured graph copies from them when it runs
        keysieve::check(driver().allocate(&memory_, kTables * bytes()), "cuMemAlloc");
    }

    DevicePointer find(void const* const* keys, Handle stream) {
        std::vector<void const*> const wanted(keys, keys + layers_);
        auto found = std::find_if(tables_.begin(), tables_.end(), [&](Table const& table) { return table.keys == wanted; });
        if (found == tables_.end()) {
            found = room();
            *found = {wanted, false, false, 0};
        }
        found->lastUse = ++uses_;
        int capturing = 0;
        keysieve::check(driver().isCapturing(stream, &capturing), "cuStreamIsCapturing");
        found->captured |= capturing != 0;
        DevicePointer const address = memory_ + static_cast<size_t>(found - tables_.begin()) * bytes();
        if (!found->filled) {
            keysieve::check(driver().copyToDevice(address, found->keys.data(), bytes(), stream), "cuMemcpyHtoDAsync");
            found->filled = capturing == 0; // a captured copy has not run yet
        }
        return address;
    }

private:
    static constexpr size_t kTables = 64;
    struct Table {
        std::vector<void const*> keys;
        bool filled;
        bool captured; // some CUDA graph reads it
        uint64_t lastUse;
    };

    size_t bytes() const { return layers_ * sizeof(DevicePointer); }

    // A new table, or the one that no graph reads and that was unused longest.
    std::vector<Table>::iterator room() {
        if (tables_.size() < kTables) {
            tables_.emplace_back();
            return tables_.end() - 1;
        }
        auto const oldest = std::min_element(tables_.begin(), tables_.end(), [](Table const& a, Table const& b) {
            return std::make_pair(a.captured, a.lastUse) < std::make_pair(b.captured, b.lastUse);
        });
        if (oldest->captured) {
            throw Error("one execution context captured CUDA graphs for " + std::to_string(kTables)
                + " different sets of cache buffers; use one more context, or fewer sets");
        }
        return oldest;
    }

    size_t layers_ = 0;
    DevicePointer memory_ = 0;
    uint64_t uses_ = 0;
    std::vector<Table> tables_;
};

class Score final : public Plugin {
public:
    static constexpr char const* NAME = "KeySieveScore";
    static constexpr char const* VERSION = "1"; // of the contract

    Score(nvinfer1::PluginFieldCollection const& fields, std::string layerName)
        : Plugin(NAME, VERSION, std::move(layerName)),
          policy_(textField(fields, "policy")),
          queryHeads_(integerField(fields, "query_heads")),
          rotaryDim_(integerField(fields, "rotary_dim")),
          interleaved_(integerField(fields, "interleaved")) {}

    Score(Score const& other) // the tables belong to one execution context
        : Plugin(other), policy_(other.policy_), queryHeads_(other.queryHeads_), rotaryDim_(other.rotaryDim_),
          interleaved_(other.interleaved_) {}

    static void declare(Fields& fields) {
        fields.declare("policy", nvinfer1::PluginFieldType::kCHAR);
        fields.declare("query_heads", nvinfer1::PluginFieldType::kINT32);
        fields.declare("rotary_dim", nvinfer1::PluginFieldType::kINT32);
        fields.declare("interleaved", nvinfer1::PluginFieldType::kINT32);
    }

    std::unique_ptr<Plugin> copy() const override { return std::make_unique<Score>(*this); }
    Types inputTypes() const override { return score::inputTypes(configuration); }
    Types outputTypes() const override { return {nvinfer1::DataType::kFLOAT}; }

    void check(std::vector<Shape> const& inputs) const override {
        score::check(configuration, inputs, policy_, queryHeads_, rotaryDim_, interleaved_);
    }

    void attributes(Fields& fields) const override {
        fields.add("policy", policy_);
        fields.add("query_heads", queryHeads_);
        fields.add("rotary_dim", rotaryDim_);
        fields.add("interleaved", interleaved_);
    }

    void prepare() override {
        loadKernel("score");
        tables_.allocate(static_cast<size_t>(configuration.layers));
    }

    void outputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs* out,
        nvinfer1::IExprBuilder& builder) const override {
        nvinfer1::DimsExprs const& key = in[score::kKey];
        out[0].nbDims = 4;
        out[0].d[0] = builder.constant(inputs - score::kKey);
        out[0].d[1] = key.d[0];
        out[0].d[2] = builder.constant(queryHeads_);
        out[0].d[3] = key.d[2];
    }

    void run(std::vector<Shape> const& inputs, void const* const* in, void* const* out, void*, Handle stream) override {
        prepare();
        DevicePointer const keys = tables_.find(in + score::kKey, stream);
        launch(score::launch(inputs, keys, in, out), stream);
    }

private:
    std::string policy_;
    int32_t queryHeads_;
    int32_t rotaryDim_;
    int32_t interleaved_;
    KeyTables tables_;
};

} // namespace

nvinfer1::IPluginCreatorInterface* scoreCreator() {
    static Creator<Score> creator;
    return &creator;
}

} // namespace keysieve
