// Attributes of a plugin, as TensorRT hands them over and takes them back.
#pragma once

#include "abi.h"
#include "error.h"

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace keysieve {

// Readers of createPlugin's fields. Throw Error for a field that is missing or of another type.
int32_t integerField(nvinfer1::PluginFieldCollection const& fields, char const* name);
std::string textField(nvinfer1::PluginFieldCollection const& fields, char const* name);
bool hasField(nvinfer1::PluginFieldCollection const& fields, char const* name);

// Owner of fields that TensorRT reads later.
class Fields {
public:
    void declare(char const* name, nvinfer1::PluginFieldType type);
    void add(char const* name, int32_t value);
    void add(char const* name, std::string const& value);
    nvinfer1::PluginFieldCollection const* collection();

private:
    std::deque<int32_t> integers_; // a deque: addresses stay
    std::deque<std::string> texts_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

} // namespace keysieve
