// Unit tests of the plugins' host side against a driver that only records. Exits with the number of failed checks.

#include "../../../plugins/tensorrt/plugin.h"

#include <cstdio>
#include <cstring>
#include <functional>

namespace keysieve {

Configuration const configuration
    = {3, 4, 2, 16, 24, 1, 16, 0, 2, 8, KEYSIEVE_TEST_ALIASED, "trig", "per_layer_per_head", nvinfer1::DataType::kHALF};

namespace {
unsigned char const kCode[] = {1};
}
Image const images[] = {
    {"update", 80, false, false, kCode, 1, "update_80", 8, 64, 20, 8, 0, 2147483647},
    {"score", 80, false, false, kCode, 1, "score_80", 8, 128, 11, 6, 64, 50},
    {"select_stats", 80, false, false, kCode, 1, "stats_80", 4, 0, 9, 6, 0, 100},
    {"select_plan", 80, false, false, kCode, 1, "plan_80", 8, 256, 15, 6, 0, 100},
    {"score", 80, true, false, kCode, 1, "score_ptx", 8, 128, 11, 6, 64, 50},
    {"score", 86, false, false, kCode, 1, "score_86", 8, 128, 11, 6, 64, 50},
    {"score", 90, false, true, kCode, 1, "score_90a", 8, 128, 11, 6, 64, 50},
};
size_t const imageCount = sizeof(images) / sizeof(images[0]);
char const* const description = "{}";

namespace {

int failures = 0;

void expect(bool holds, char const* what, int line) {
    if (!holds) {
        std::printf("line %d: %s\n", line, what);
        ++failures;
    }
}
#define EXPECT(condition) expect((condition), #condition, __LINE__)

std::string thrown(std::function<void()> const& body) {
    try {
        body();
    } catch (Error const& error) {
        return error.what();
    }
    return "nothing thrown";
}

bool contains(std::string const& text, char const* part) { return text.find(part) != std::string::npos; }

// -- the driver --------------------------------------------------------------------------------------------------------

struct Launched {
    std::string entry;
    unsigned grid[3];
    unsigned threads;
    unsigned shared;
    std::vector<uint64_t> values;
};

int architecture = 80;
int capturing = 0;
int loads = 0;
int copies = 0;
size_t copiedOnDevice = 0;
int live = 0; // allocations
Status failLaunch = kSuccess;
Status failLoad = kSuccess;
std::vector<Launched> launched;

Driver const fake = {
    [](unsigned) -> Status { return kSuccess; },
    [](int* device) -> Status { *device = 0; return kSuccess; },
    [](int* value, int attribute, int) -> Status {
        *value = attribute == 75 ? architecture / 10 : architecture % 10;
        return kSuccess;
    },
    [](Handle* library, void const*, void*, void**, unsigned, void*, void**, unsigned) -> Status {
        ++loads;
        *library = &loads;
        return failLoad;
    },
    [](Handle* kernel, Handle, char const* name) -> Status {
        *kernel = const_cast<char*>(name);
        return kSuccess;
    },
    [](Handle kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, Handle,
        void** parameters, void**) -> Status {
        Launched work{static_cast<char const*>(kernel), {x, y, z}, threads, shared, {}};
        for (Image const& image : images) {
            if (work.entry == image.entry) {
                for (uint32_t i = 0; i < image.parameters; ++i) {
                    work.values.push_back(*static_cast<uint64_t*>(parameters[i]));
                }
            }
        }
        launched.push_back(work);
        return failLaunch;
    },
    [](DevicePointer, void const*, size_t, Handle) -> Status { ++copies; return kSuccess; },
    [](DevicePointer, DevicePointer, size_t bytes, Handle) -> Status { copiedOnDevice += bytes; return kSuccess; },
    [](Handle, int* status) -> Status { *status = capturing; return kSuccess; },
    [](DevicePointer* memory, size_t) -> Status { *memory = 0x1000000; ++live; return kSuccess; },
    [](DevicePointer) -> Status { --live; return kSuccess; },
    [](Status, char const** name) -> Status { *name = "CUDA_ERROR_FAKE"; return kSuccess; },
    [](Status, char const** text) -> Status { *text = "made up"; return kSuccess; },
};

// -- helpers -----------------------------------------------------------------------------------------------------------

void* at(uint64_t address) { return reinterpret_cast<void*>(address); }

nvinfer1::PluginTensorDesc tensor(Shape const& shape) {
    nvinfer1::PluginTensorDesc result{};
    result.dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), result.dims.d);
    return result;
}

std::vector<nvinfer1::PluginTensorDesc> tensors(std::vector<Shape> const& shapes) {
    std::vector<nvinfer1::PluginTensorDesc> result;
    for (Shape const& shape : shapes) {
        result.push_back(tensor(shape));
    }
    return result;
}

struct Recorder : nvinfer1::IErrorRecorder {
    std::string text;
    nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"IErrorRecorder", 1, 0}; }
    int32_t getNbErrors() const noexcept override { return 0; }
    nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override { return nvinfer1::ErrorCode::kFAILED_EXECUTION; }
    char const* getErrorDesc(int32_t) const noexcept override { return ""; }
    bool hasOverflowed() const noexcept override { return false; }
    void clear() noexcept override {}
    bool reportError(nvinfer1::ErrorCode, char const* description) noexcept override {
        text = description;
        return true;
    }
};

struct Context : nvinfer1::IPluginResourceContext {
    Recorder* recorder = nullptr;
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return recorder; }
};

nvinfer1::IPluginCreatorV3One& as(nvinfer1::IPluginCreatorInterface* creator) {
    return *static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
}

nvinfer1::IPluginV3* make(nvinfer1::IPluginCreatorInterface* creator, Fields& fields) {
    return as(creator).createPlugin("the layer", fields.collection(), nvinfer1::TensorRTPhase::kRUNTIME);
}

nvinfer1::IPluginV3OneRuntime& runtime(nvinfer1::IPluginV3* plugin) {
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

nvinfer1::IPluginV3OneBuildV2& build(nvinfer1::IPluginV3* plugin) {
    return *static_cast<nvinfer1::IPluginV3OneBuildV2*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}

void reset() {
    launched.clear();
    forgetKernels();
    loads = copies = capturing = 0;
    copiedOnDevice = 0;
    architecture = 80;
    failLaunch = failLoad = kSuccess;
}

Shape const kKey = {5, 2, 100, 16};
Shape const kValue = {5, 2, 100, 24};
std::vector<Shape> const kUpdate
    = {{5, 2, 7, 16}, {5, 2, 7, 24}, {5}, {3, 5, 2, 100}, {5}, kKey, kValue};
std::vector<Shape> const kScore = {{5}, {5}, {5}, {3, 5, 4, 1, 16}, {3, 5, 4, 8}, kKey, kKey, kKey};
std::vector<Shape> const kSelect = {{3, 5, 4, 100}, {5}, {5}, {5}, {5}};

Fields scoreFields() {
    Fields fields;
    fields.add("policy", std::string("trig"));
    fields.add("query_heads", 4);
    fields.add("rotary_dim", 16);
    fields.add("interleaved", 0);
    return fields;
}

// -- tests -------------------------------------------------------------------------------------------------------------

void choosesImages() {
    auto const entry = [](int arch) { return std::string(chooseImage(images, imageCount, "score", arch).entry); };
    EXPECT(entry(80) == "score_80");
    EXPECT(entry(86) == "score_86");
    EXPECT(entry(87) == "score_86");
    EXPECT(entry(89) == "score_86");
    EXPECT(entry(90) == "score_90a");
    EXPECT(entry(100) == "score_ptx");
    EXPECT(entry(121) == "score_ptx");
    std::string const error = thrown([&] { entry(75); });
    EXPECT(contains(error, "does not run on sm_75") && contains(error, "sm_90a") && contains(error, "--arch 75"));
    EXPECT(contains(thrown([] { chooseImage(images, imageCount, "update", 90); }), "does not run on sm_90"));
}

void grids() {
    Image const& score = images[1];
    EXPECT(gridOf(score, 2, 100) == 24); // two parts of 64 rows of 3 layers' 2 heads each
    EXPECT(gridOf(score, 5, 64) == 30);
    EXPECT(gridOf(score, 5, 100) == 50); // as many as share the parts
    EXPECT(gridOf(score, 1000000000, 64) == 50);
    EXPECT(gridOf(score, 0, 64) == 0);
    Image const& update = images[0];
    EXPECT(gridOf(update, 5, 100) == 40);
    EXPECT(contains(thrown([&] { gridOf(update, 300000000, 64); }), "use a smaller batch"));
}

void sizesAreChecked() {
    update::check(configuration, kUpdate, 2);
    score::check(configuration, kScore, "trig", 4, 16, 0);
    select::check(configuration, kSelect, "per_layer_per_head", 2, 2, 8);
    auto unknown = kUpdate;
    unknown[update::kKey] = {kUnknown, 2, kUnknown, 16};
    update::check(configuration, unknown, 0);
    EXPECT(contains(thrown([] { update::check(configuration, kUpdate, 3); }), "attribute layer is 3"));
    auto wrong = kUpdate;
    wrong[update::kPlan] = {1, 5, 2, 100}; // a sliding window's
    update::check(configuration, wrong, 0);
    wrong[update::kPlan] = {2, 5, 2, 100};
    EXPECT(contains(thrown([&] { update::check(configuration, wrong, 0); }), "input plan has shape [2,5,2,100], this library needs [3,5,2,100]"));
    wrong = kUpdate;
    wrong[update::kKey] = wrong[update::kValue] = {};
    EXPECT(contains(thrown([&] { update::check(configuration, wrong, 0); }), "input key has shape []"));
    for (Shape* shape : {&(wrong = kUpdate)[update::kKey], &wrong[update::kValue], &wrong[update::kPlan]}) {
        (*shape)[shape == &wrong[update::kPlan] ? 3 : 2] = 65537;
    }
    EXPECT(contains(thrown([&] { update::check(configuration, wrong, 0); }), "capacity 65537 is beyond"));
    EXPECT(contains(thrown([] { score::check(configuration, kScore, "random", 4, 16, 0); }), "attribute policy is 'random'"));
    EXPECT(contains(thrown([] { score::check(configuration, kScore, "trig", 8, 16, 0); }), "attribute query_heads is 8"));
    auto fewer = kScore;
    fewer.pop_back();
    EXPECT(contains(thrown([&] { score::check(configuration, fewer, "trig", 4, 16, 0); }), "7 inputs"));
    EXPECT(contains(thrown([] { select::check(configuration, kSelect, "union", 2, 2, 8); }), "attribute scope is 'union'"));
}

void updateLaunches() {
    reset();
    Fields fields;
    fields.add("layer", 2);
    nvinfer1::IPluginV3* plugin = make(updateCreator(), fields);
    Context context;
    Recorder recorder;
    context.recorder = &recorder;
    nvinfer1::IPluginV3* attached = runtime(plugin).attachToContext(&context);
    EXPECT(attached != nullptr && loads == 1);
    auto const in = tensors(kUpdate);
    EXPECT(runtime(attached).onShapeChange(in.data(), 7, nullptr, 2) == 0);
    void const* inputs[7] = {at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
    void* outputs[2] = {at(6), at(7)};
    EXPECT(runtime(attached).enqueue(in.data(), nullptr, inputs, outputs, nullptr, nullptr) == 0);
    EXPECT(launched.size() == 1 && launched[0].entry == "update_80");
    EXPECT(launched[0].grid[0] == 40 && launched[0].grid[1] == 1 && launched[0].grid[2] == 1);
    EXPECT(launched[0].threads == 256 && launched[0].shared == 64);
    EXPECT((launched[0].values == std::vector<uint64_t>{1, 2, 3, 4, 5, 6, 7, 5, 100, 7, 3, 2, 224, 112, 16, 336, 168, 24, 0, 0}));
    EXPECT(loads == 1 && copiedOnDevice == 0);

    outputs[0] = at(99); // not the cache that came in
    int32_t const status = runtime(attached).enqueue(in.data(), nullptr, inputs, outputs, nullptr, nullptr);
    if (configuration.aliased != 0) {
        EXPECT(status != 0 && contains(recorder.text, "KeySieveUpdate of layer 'the layer': the cache's input and output"));
        EXPECT(build(plugin).getAliasedInput(0) == 5 && build(plugin).getAliasedInput(1) == 6);
    } else {
        EXPECT(status == 0 && copiedOnDevice == 5 * 2 * 100 * 16 * 2 && launched.back().values[5] == 99);
        EXPECT(build(plugin).getAliasedInput(0) == -1 && build(plugin).getAliasedInput(1) == -1);
    }
    outputs[0] = at(6);

    failLaunch = 719;
    EXPECT(runtime(attached).enqueue(in.data(), nullptr, inputs, outputs, nullptr, nullptr) != 0);
    EXPECT(contains(recorder.text, "KeySieveUpdate of layer 'the layer': cuLaunchKernel of update failed: CUDA_ERROR_FAKE"));
    EXPECT(contains(takeLastError(), "(made up)"));
    failLaunch = kSuccess;

    auto empty = kUpdate;
    for (Shape& shape : empty) {
        shape[shape.size() == 4 && shape[0] == 3 ? 1 : 0] = 0;
    }
    size_t const before = launched.size();
    auto const none = tensors(empty);
    EXPECT(runtime(attached).enqueue(none.data(), nullptr, inputs, outputs, nullptr, nullptr) == 0);
    EXPECT(launched.size() == before);
    delete attached;
    delete plugin;
}

void scoreKeepsTables() {
    reset();
    Fields fields = scoreFields();
    nvinfer1::IPluginV3* plugin = make(scoreCreator(), fields);
    Context context;
    nvinfer1::IPluginV3* attached = runtime(plugin).attachToContext(&context);
    EXPECT(live == 1);
    auto const in = tensors(kScore);
    void const* inputs[8] = {at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8)};
    void* outputs[1] = {at(9)};
    auto const step = [&] { return runtime(attached).enqueue(in.data(), nullptr, inputs, outputs, nullptr, nullptr); };
    EXPECT(step() == 0 && step() == 0 && copies == 1); // an array is copied once
    EXPECT((launched[0].values == std::vector<uint64_t>{0x1000000, 4, 5, 1, 2, 3, 9, 5, 100, 0, 0}));
    EXPECT(launched[0].grid[0] == 50 && launched[0].grid[1] == 1 && launched[0].grid[2] == 1);
    inputs[7] = at(80); // other buffers: an array of their own
    EXPECT(step() == 0 && copies == 2 && launched.back().values[0] == 0x1000000 + 24);
    inputs[7] = at(8);
    EXPECT(step() == 0 && copies == 2 && launched.back().values[0] == 0x1000000);
    inputs[7] = at(81);
    capturing = 1; // captured: the copy has not run, so the next step copies again
    EXPECT(step() == 0 && copies == 3);
    capturing = 0;
    EXPECT(step() == 0 && copies == 4 && step() == 0 && copies == 4);
    uint64_t const captured = launched.back().values[0];
    for (uint64_t other = 1000; other < 1200; ++other) {
        inputs[7] = at(other);
        EXPECT(step() == 0 && launched.back().values[0] != captured); // a graph's array is never overwritten
    }
    capturing = 1;
    int32_t status = 0;
    for (uint64_t other = 2000; other < 2064; ++other) {
        inputs[7] = at(other);
        status = step();
    }
    EXPECT(status != 0 && contains(takeLastError(), "64 different sets of cache buffers"));
    delete attached;
    EXPECT(live == 0);
    delete plugin;
}

void selectLaunches() {
    reset();
    Fields fields;
    fields.add("scope", std::string("per_layer_per_head"));
    fields.add("kv_heads", 2);
    fields.add("sinks", 2);
    fields.add("recent", 8);
    nvinfer1::IPluginV3* plugin = make(selectCreator(), fields);
    auto const in = tensors(kSelect);
    void const* inputs[5] = {at(1), at(2), at(3), at(4), at(5)};
    void* outputs[3] = {at(6), at(7), at(8)};
    void* const workspace = at(0x10000);
    EXPECT(runtime(plugin).enqueue(in.data(), nullptr, inputs, outputs, workspace, nullptr) == 0);
    EXPECT(launched.size() == 1 && launched[0].entry == "plan_80");
    EXPECT((launched[0].values == std::vector<uint64_t>{1, 0x10000, 2, 3, 4, 5, 1, 0x10000, 6, 7, 8, 5, 100, 0, 0}));
    EXPECT(select::workspaceBytes(configuration, 5, 100) == 12032);
    delete plugin;

    Configuration shared = configuration; // a plan of all layers needs the statistics of all
    shared.scope = "per_head";
    std::vector<Launch> const both = select::launches(shared, kSelect, inputs, outputs, workspace);
    EXPECT(both.size() == 2 && std::string(both[0].kernel) == "select_stats" && std::string(both[1].kernel) == "select_plan");
    auto const values = [](Launch const& work) {
        std::vector<uint64_t> result;
        for (size_t i = 0; i < work.arguments.size(); ++i) {
            result.push_back(work.arguments.value(i));
        }
        return result;
    };
    EXPECT((values(both[0]) == std::vector<uint64_t>{1, 2, 3, 5, 0x10000, 5, 100}));
    uint64_t const ranks = 0x10000 + 1024; // 3 * 5 * 4 heads of 16 bytes, rounded up to 256
    EXPECT((values(both[1]) == std::vector<uint64_t>{1, 0x10000, 2, 3, 4, 5, 1, ranks, 6, 7, 8, 5, 100}));
    EXPECT(select::workspaceBytes(shared, 5, 100) == 1024 + 4096);
}

void fieldsAreChecked() {
    Fields none;
    EXPECT(make(updateCreator(), none) == nullptr && contains(takeLastError(), "attribute layer is missing"));
    Fields text;
    text.add("layer", std::string("2"));
    EXPECT(make(updateCreator(), text) == nullptr && contains(takeLastError(), "attribute layer must be one int32"));
    Fields version;
    version.add("layer", 1);
    version.add("plugin_version", std::string("9"));
    EXPECT(make(updateCreator(), version) == nullptr && contains(takeLastError(), "plugin_version 9"));
    EXPECT(as(updateCreator()).createPlugin("x", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr);

    Fields fields = scoreFields();
    nvinfer1::IPluginV3* plugin = make(scoreCreator(), fields);
    nvinfer1::PluginFieldCollection const* kept = runtime(plugin).getFieldsToSerialize();
    nvinfer1::IPluginV3* again = as(scoreCreator()).createPlugin("42", kept, nvinfer1::TensorRTPhase::kRUNTIME);
    EXPECT(again != nullptr);
    EXPECT(std::strcmp(build(again).getMetadataString(), "the layer") == 0); // the name survives the plan
    nvinfer1::PluginFieldCollection const* twice = runtime(again).getFieldsToSerialize();
    EXPECT(twice->nbFields == kept->nbFields && textField(*twice, "policy") == "trig" && integerField(*twice, "rotary_dim") == 16);
    delete again;
    nvinfer1::IPluginV3* copy = plugin->clone();
    EXPECT(copy != nullptr && copy != plugin);
    delete copy;
    delete plugin;
}

void formatsAreChecked() {
    Fields fields;
    fields.add("layer", 0);
    nvinfer1::IPluginV3* plugin = make(updateCreator(), fields);
    std::vector<nvinfer1::DynamicPluginTensorDesc> all(9);
    Types types = update::inputTypes(configuration);
    types.insert(types.end(), 2, configuration.cacheType);
    for (int32_t i = 0; i < 9; ++i) {
        all[static_cast<size_t>(i)].desc.type = types[static_cast<size_t>(i)];
        EXPECT(build(plugin).supportsFormatCombination(i, all.data(), 7, 2));
        all[static_cast<size_t>(i)].desc.type = nvinfer1::DataType::kFLOAT;
        EXPECT(!build(plugin).supportsFormatCombination(i, all.data(), 7, 2));
        all[static_cast<size_t>(i)].desc.type = types[static_cast<size_t>(i)];
        all[static_cast<size_t>(i)].desc.format = static_cast<nvinfer1::TensorFormat>(1);
        EXPECT(!build(plugin).supportsFormatCombination(i, all.data(), 7, 2));
        all[static_cast<size_t>(i)].desc.format = nvinfer1::TensorFormat::kLINEAR;
    }
    EXPECT(build(plugin).getNbOutputs() == 2);
    delete plugin;
}

void worksWithoutDriver() {
    reset();
    replaceDriver(nullptr);
    Fields fields = scoreFields();
    nvinfer1::IPluginV3* plugin = make(scoreCreator(), fields);
    Context context;
    Recorder recorder;
    context.recorder = &recorder;
    nvinfer1::IPluginV3* attached = runtime(plugin).attachToContext(&context); // TensorRT does so while it builds
    EXPECT(attached != nullptr);
    delete attached;
    delete plugin;
    replaceDriver(&fake);
}

void reportsTooNewPtx() {
    reset();
    architecture = 120;
    failLoad = kUnsupportedPtx;
    EXPECT(contains(thrown([] { loadKernel("score"); }), "PTX is too new for this driver"));
    failLoad = kInvalidImage;
    EXPECT(contains(thrown([] { loadKernel("score"); }), "cuLibraryLoadData failed: CUDA_ERROR_FAKE (made up)"));
}

} // namespace
} // namespace keysieve

int main() {
    using namespace keysieve;
    replaceDriver(&fake);
    choosesImages();
    grids();
    sizesAreChecked();
    updateLaunches();
    scoreKeepsTables();
    selectLaunches();
    fieldsAreChecked();
    formatsAreChecked();
    worksWithoutDriver();
    reportsTooNewPtx();
    std::printf("%d failed\n", failures);
    return failures;
}
