#include "fields.h"

#include <cstring>

namespace keysieve {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

PluginField const* find(nvinfer1::PluginFieldCollection const& fields, char const* name) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        if (fields.fields[i].name != nullptr && std::strcmp(fields.fields[i].name, name) == 0) {
            return &fields.fields[i];
        }
    }
    return nullptr;
}

PluginField const& require(nvinfer1::PluginFieldCollection const& fields, char const* name, PluginFieldType type,
    char const* typeName) {
    PluginField const* const field = find(fields, name);
    if (field == nullptr || field->data == nullptr) {
        throw Error(std::string("attribute ") + name + " is missing; export the model again with this version of keysieve");
    }
    if (field->type != type) {
        throw Error(std::string("attribute ") + name + " must be " + typeName + ", it has field type "
            + std::to_string(static_cast<int>(field->type)) + "; export the model again with this version of keysieve");
    }
    return *field;
}

} // namespace

bool hasField(nvinfer1::PluginFieldCollection const& fields, char const* name) { return find(fields, name) != nullptr; }

int32_t integerField(nvinfer1::PluginFieldCollection const& fields, char const* name) {
    PluginField const& field = require(fields, name, PluginFieldType::kINT32, "one int32");
    if (field.length != 1) {
        throw Error(std::string("attribute ") + name + " must be one int32, it has " + std::to_string(field.length)
            + " values; export the model again with this version of keysieve");
    }
    int32_t value = 0;
    std::memcpy(&value, field.data, sizeof(value));
    return value;
}

std::string textField(nvinfer1::PluginFieldCollection const& fields, char const* name) {
    PluginField const& field = require(fields, name, PluginFieldType::kCHAR, "text");
    std::string text(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
    return text.substr(0, text.find('\0')); // some parsers count the terminator
}

void Fields::declare(char const* name, PluginFieldType type) { fields_.push_back(PluginField{name, nullptr, type, 1}); }

void Fields::add(char const* name, int32_t value) {
    integers_.push_back(value);
    fields_.push_back(PluginField{name, &integers_.back(), PluginFieldType::kINT32, 1});
}

void Fields::add(char const* name, std::string const& value) {
    texts_.push_back(value);
    std::string const& kept = texts_.back();
    fields_.push_back(PluginField{name, kept.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(kept.size())});
}

nvinfer1::PluginFieldCollection const* Fields::collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
}

} // namespace keysieve
