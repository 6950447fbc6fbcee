// Drives a plugin library of keysieve as TensorRT does, without TensorRT: getCreators, createPlugin, enqueue.
//
// Built by pack.py beside plugins/tensorrt/fields.cpp, whose headers declare TensorRT's interfaces.

#include "abi.h"
#include "fields.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <list>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Context : IPluginResourceContext {
    IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
} context;

struct Made {
    IPluginV3* plugin;
    IPluginV3* attached;
    char const* (*error)();
};

std::list<std::string> names; // field names, which a collection refers to

IPluginV3OneRuntime& runtimeOf(IPluginV3* plugin) {
    return *static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

IPluginV3OneBuildV2& buildOf(IPluginV3* plugin) {
    return *static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

std::vector<PluginTensorDesc> describe(int count, int64_t const* sizes, int32_t const* ranks) {
    std::vector<PluginTensorDesc> result(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        Dims& dims = result[static_cast<size_t>(i)].dims;
        dims.nbDims = ranks[i];
        for (int d = 0; d < ranks[i]; ++d) {
            dims.d[d] = *sizes++;
        }
    }
    return result;
}

} // namespace

extern "C" {

// fields: "layer=i:5;policy=s:trig". Returns null, with the reason on stderr, where the plugin refuses.
void* keysieve_make(char const* library, int index, char const* fields) {
    void* loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (loaded == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return nullptr;
    }
    auto const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(loaded, "getCreators"));
    auto const error = reinterpret_cast<char const* (*)()>(dlsym(loaded, "keysieve_last_error"));
    int32_t count = 0;
    auto* creator = static_cast<IPluginCreatorV3One*>(creators(count)[index]);
    keysieve::Fields given;
    std::string const text = fields;
    for (size_t at = 0; at < text.size();) {
        size_t const end = std::min(text.find(';', at), text.size());
        std::string const one = text.substr(at, end - at);
        at = end + 1;
        size_t const equal = one.find('=');
        names.push_back(one.substr(0, equal));
        std::string const value = one.substr(equal + 3);
        if (one[equal + 1] == 'i') {
            given.add(names.back().c_str(), std::stoi(value));
        } else {
            given.add(names.back().c_str(), value);
        }
    }
    IPluginV3* plugin = creator->createPlugin("driver", given.collection(), TensorRTPhase::kRUNTIME);
    if (plugin == nullptr) {
        std::fprintf(stderr, "createPlugin: %s\n", error());
        return nullptr;
    }
    IPluginV3* attached = runtimeOf(plugin).attachToContext(&context);
    return new Made{plugin, attached != nullptr ? attached : plugin, error};
}

int keysieve_enqueue(void* made, int count, int64_t const* sizes, int32_t const* ranks, void const* const* inputs,
    void* const* outputs, void* workspace, void* stream) {
    auto const described = describe(count, sizes, ranks);
    return runtimeOf(static_cast<Made*>(made)->attached)
        .enqueue(described.data(), nullptr, inputs, outputs, workspace, reinterpret_cast<cudaStream_t>(stream));
}

int64_t keysieve_workspace(void* made, int count, int64_t const* sizes, int32_t const* ranks) {
    auto const described = describe(count, sizes, ranks);
    std::vector<DynamicPluginTensorDesc> ranges(described.size());
    for (size_t i = 0; i < described.size(); ++i) {
        ranges[i].desc = described[i];
        ranges[i].min = ranges[i].max = ranges[i].opt = described[i].dims;
    }
    return static_cast<int64_t>(
        buildOf(static_cast<Made*>(made)->plugin).getWorkspaceSize(ranges.data(), count, nullptr, 0));
}

char const* keysieve_error(void* made) { return static_cast<Made*>(made)->error(); }

} // extern "C"
