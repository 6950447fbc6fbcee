#include "nodes.h"

#include <cstring>

namespace keysieve {
namespace {

using nvinfer1::DataType;

constexpr size_t kAlignment = 256;
constexpr int64_t kStatsFields = 4; // highest, mean, 1 / std, padding

std::string text(Shape const& shape) {
    std::string result = "[";
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        result += (axis == 0 ? "" : ",") + (shape[axis] == kUnknown ? std::string("?") : std::to_string(shape[axis]));
    }
    return result + "]";
}

// Sizes must agree where both are known.
void expectShape(char const* input, Shape const& found, Shape const& expected) {
    bool matches = found.size() == expected.size();
    for (size_t axis = 0; matches && axis < found.size(); ++axis) {
        matches = found[axis] == expected[axis] || found[axis] == kUnknown || expected[axis] == kUnknown;
    }
    if (!matches) {
        throw Error(std::string("input ") + input + " has shape " + text(found) + ", this library needs " + text(expected)
            + "; build the plugin library from the same bundle");
    }
}

template <typename Value>
void expectAttribute(char const* name, Value const& found, Value const& built) {
    if (found != built) {
        auto const show = [](auto const& value) {
            if constexpr (std::is_same_v<Value, std::string>) {
                return "'" + value + "'";
            } else {
                return std::to_string(value);
            }
        };
        throw Error(std::string("attribute ") + name + " is " + show(found) + ", this library was built for " + show(built)
            + "; build the plugin library from the same bundle");
    }
}

void expectCapacity(int64_t capacity) {
    if (capacity > kMaxCapacity) {
        throw Error("capacity " + std::to_string(capacity) + " is beyond the " + std::to_string(kMaxCapacity)
            + " rows that the kernels address; lower the profile's capacity");
    }
}

void expectInputs(size_t found, size_t expected) {
    if (found != expected) {
        throw Error("the node has " + std::to_string(found) + " inputs, this library needs " + std::to_string(expected)
            + "; build the plugin library from the same bundle");
    }
}

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

} // namespace

int32_t Configuration::planLayers() const { return std::strcmp(scope, "per_layer_per_head") == 0 ? layers : 1; }
int32_t Configuration::planHeads() const { return std::strcmp(scope, "union") == 0 ? 1 : kvHeads; }
bool Configuration::needsStats() const { return std::strcmp(scope, "per_layer_per_head") != 0; }

namespace update {

int32_t aliasedInput(int32_t output) { return output == kKeyOut ? kKey : output == kValueOut ? kValue : -1; }

size_t cacheBytes(Configuration const& built, Shape const& cache) {
    size_t bytes = built.cacheType == DataType::kFLOAT ? 4 : 2;
    for (int64_t size : cache) {
        bytes *= static_cast<size_t>(size);
    }
    return bytes;
}

Types inputTypes(Configuration const& built) {
    DataType const cache = built.cacheType;
    return {cache, cache, DataType::kINT32, DataType::kINT32, DataType::kINT32, cache, cache};
}

void check(Configuration const& built, std::vector<Shape> const& inputs, int32_t layer) {
    expectInputs(inputs.size(), kInputs);
    if (layer < 0 || layer >= built.layers) {
        throw Error("attribute layer is " + std::to_string(layer) + ", this library was built for " + std::to_string(built.layers)
            + " layers; build the plugin library from the same bundle");
    }
    int64_t const batch = inputs[kKey].size() == 4 ? inputs[kKey][0] : kUnknown;
    int64_t const capacity = inputs[kKey].size() == 4 ? inputs[kKey][2] : kUnknown;
    int64_t const tokens = inputs[kKeyNew].size() == 4 ? inputs[kKeyNew][2] : kUnknown;
    expectShape("key", inputs[kKey], {batch, built.kvHeads, capacity, built.headDim});
    expectShape("value", inputs[kValue], {batch, built.kvHeads, capacity, built.valueDim});
    expectShape("key_new", inputs[kKeyNew], {batch, built.kvHeads, tokens, built.headDim});
    expectShape("value_new", inputs[kValueNew], {batch, built.kvHeads, tokens, built.valueDim});
    expectShape("length", inputs[kLength], {batch});
    // The caches of a sliding window follow a plan of their own, of one layer.
    bool const shared = inputs[kPlan].size() == 4 && inputs[kPlan][0] == 1;
    expectShape("plan", inputs[kPlan], {shared ? 1 : built.planLayers(), batch, built.planHeads(), capacity});
    expectShape("keep", inputs[kKeep], {batch});
    expectCapacity(capacity);
}

Launch launch(std::vector<Shape> const& inputs, void const* const* in, void* const* out, int32_t layer) {
    int64_t const batch = inputs[kKey][0];
    int64_t const capacity = inputs[kKey][2];
    int64_t const tokens = inputs[kKeyNew][2];
    int64_t const planLayers = inputs[kPlan][0];
    Arguments arguments;
    for (int32_t input : {kKeyNew, kValueNew, kLength, kPlan, kKeep}) {
        arguments.pointer(in[input]);
    }
    arguments.pointer(out[kKeyOut]).pointer(out[kValueOut]);
    arguments.integer(batch).integer(capacity).integer(tokens).integer(planLayers).integer(layer);
    for (int32_t input : {kKeyNew, kValueNew}) { // the strides of [B,Hkv,S,D]: TensorRT's tensors are contiguous
        Shape const& shape = inputs[static_cast<size_t>(input)];
        arguments.integer(shape[1] * shape[2] * shape[3]).integer(shape[2] * shape[3]).integer(shape[3]);
    }
    return {"update", batch, capacity, arguments};
}

} // namespace update

namespace score {

Types inputTypes(Configuration const& built) {
    Types types = {DataType::kINT32, DataType::kINT32, DataType::kINT64, DataType::kFLOAT, DataType::kFLOAT};
    types.insert(types.end(), static_cast<size_t>(built.layers), built.cacheType);
    return types;
}

void check(Configuration const& built, std::vector<Shape> const& inputs, std::string const& policy, int32_t queryHeads,
    int32_t rotaryDim, int32_t interleaved) {
    expectAttribute("policy", policy, std::string(built.policy));
    expectAttribute("query_heads", queryHeads, built.queryHeads);
    expectAttribute("rotary_dim", rotaryDim, built.rotaryDim);
    expectAttribute("interleaved", interleaved, built.interleaved);
    expectInputs(inputs.size(), static_cast<size_t>(kKey + built.layers));
    int64_t const batch = inputs[kKey].size() == 4 ? inputs[kKey][0] : kUnknown;
    int64_t const capacity = inputs[kKey].size() == 4 ? inputs[kKey][2] : kUnknown;
    for (int32_t layer = 0; layer < built.layers; ++layer) {
        std::string const name = "key_" + std::to_string(layer);
        expectShape(name.c_str(), inputs[static_cast<size_t>(kKey + layer)], {batch, built.kvHeads, capacity, built.headDim});
    }
    for (auto const& [name, input] : {std::pair{"length", kLength}, {"limit", kLimit}, {"position", kPosition}}) {
        expectShape(name, inputs[input], {batch});
    }
    if (policy == "trig") {
        expectShape("centre", inputs[kCentre], {built.layers, batch, built.queryHeads, built.offsets, built.headDim});
        expectShape("weight", inputs[kWeight], {built.layers, batch, built.queryHeads, built.rotaryDim / 2});
    }
    expectCapacity(capacity);
}

Launch launch(std::vector<Shape> const& inputs, DevicePointer keys, void const* const* in, void* const* out) {
    int64_t const batch = inputs[kKey][0];
    int64_t const capacity = inputs[kKey][2];
    Arguments arguments;
    arguments.pointer(keys);
    for (int32_t input : {kCentre, kWeight, kLength, kLimit, kPosition}) {
        arguments.pointer(in[input]);
    }
    arguments.pointer(out[0]).integer(batch).integer(capacity);
    return {"score", batch, capacity, arguments};
}

} // namespace score

namespace select {

Types inputTypes() { return {DataType::kFLOAT, DataType::kINT32, DataType::kINT32, DataType::kINT32, DataType::kINT32}; }

void check(Configuration const& built, std::vector<Shape> const& inputs, std::string const& scope, int32_t kvHeads,
    int32_t sinks, int32_t recent) {
    expectAttribute("scope", scope, std::string(built.scope));
    expectAttribute("kv_heads", kvHeads, built.kvHeads);
    expectAttribute("sinks", sinks, built.sinks);
    expectAttribute("recent", recent, built.recent);
    expectInputs(inputs.size(), kInputs);
    int64_t const batch = inputs[kScores].size() == 4 ? inputs[kScores][1] : kUnknown;
    int64_t const capacity = inputs[kScores].size() == 4 ? inputs[kScores][3] : kUnknown;
    expectShape("scores", inputs[kScores], {built.layers, batch, built.queryHeads, capacity});
    for (auto const& [name, input] :
        {std::pair{"length", kLength}, {"limit", kLimit}, {"budget", kBudget}, {"pinned", kPinned}}) {
        expectShape(name, inputs[input], {batch});
    }
    expectCapacity(capacity);
}

size_t statsBytes(Configuration const& built, int64_t batch) {
    int64_t const heads = built.needsStats() ? built.layers * batch * built.queryHeads : 0;
    return aligned(static_cast<size_t>(heads * kStatsFields) * sizeof(float));
}

size_t workspaceBytes(Configuration const& built, int64_t batch, int64_t capacity) {
    size_t const ranks = static_cast<size_t>(built.planLayers() * batch * built.planHeads() * capacity) * sizeof(uint32_t);
    return statsBytes(built, batch) + aligned(ranks);
}

std::vector<Launch> launches(Configuration const& built, std::vector<Shape> const& inputs, void const* const* in,
    void* const* out, void* workspace) {
    int64_t const batch = inputs[kScores][1];
    int64_t const capacity = inputs[kScores][3];
    void* const stats = workspace;
    void* const ranks = static_cast<char*>(workspace) + statsBytes(built, batch);
    Arguments first;
    first.pointer(in[kScores]).pointer(in[kLength]).pointer(in[kLimit]).pointer(in[kPinned]).pointer(stats);
    first.integer(batch).integer(capacity);
    Arguments second;
    second.pointer(in[kScores]).pointer(stats).pointer(in[kLength]).pointer(in[kLimit]).pointer(in[kBudget]);
    void const* const utility = in[kScores]; // not read: the kernel is built without it
    second.pointer(in[kPinned]).pointer(utility).pointer(ranks).pointer(out[kPlan]).pointer(out[kKeep]).pointer(out[kEvicted]);
    second.integer(batch).integer(capacity);
    std::vector<Launch> launches;
    if (built.needsStats()) {
        launches.push_back({"select_stats", batch, capacity, first});
    }
    launches.push_back({"select_plan", batch, capacity, second});
    return launches;
}

} // namespace select

} // namespace keysieve
