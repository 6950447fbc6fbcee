#include "op.h"

#include <array>

namespace keysieve {

std::string text(Shape const& shape) {
    std::string result = "[";
    for (size_t axis = 0; axis < shape.size(); ++axis) result += (axis ? "," : "") + std::to_string(shape[axis]);
    return result + "]";
}

void check(ort::Api const& api, ort::Status* status) {
    if (!status) return;
    auto message = reinterpret_cast<char const* (*)(ort::Status const*)>(const_cast<void*>(api.functions[ort::kGetErrorMessage]));
    std::string words = message(status);
    api.release(ort::kReleaseStatus, status);
    throw std::runtime_error(words);
}

int64_t count(Shape const& shape) {
    int64_t product = 1;
    for (int64_t size : shape) product *= size;
    return product;
}

Shape leading(Tensor const& x, char const* name, int64_t width) {
    Shape first = x.shape;
    int64_t last = first.back();
    first.pop_back();
    if (last != width && first.size() == 3) {
        last *= first.back();
        first.pop_back();
    }
    if (last != width)
        throw std::runtime_error(std::string(name) + " is " + text(x.shape) + ", not [..., " + std::to_string(width) + "]");
    return first;
}

int64_t partsOf(int64_t rows) {
    constexpr int64_t kRows = 128, kMost = 64;
    return std::min((rows + kRows - 1) / kRows, kMost);
}

int64_t Attributes::integer(char const* name) const {
    int64_t value = 0;
    check(api_, api_.call(ort::kGetAttributeInt64, info_, name, &value));
    return value;
}

float Attributes::real(char const* name) const {
    float value = 0;
    check(api_, api_.call(ort::kGetAttributeFloat, info_, name, &value));
    return value;
}

std::string Attributes::string(char const* name) const {
    size_t size = 0;
    char* nowhere = nullptr;
    check(api_, api_.call(ort::kGetAttributeString, info_, name, nowhere, &size));
    std::string value(size, '\0');
    check(api_, api_.call(ort::kGetAttributeString, info_, name, value.data(), &size));
    value.resize(size ? size - 1 : 0);
    return value;
}

void Attributes::expectVersion(std::string const& version) const {
    std::string found = version; // of a node that says nothing
    try {
        found = string("plugin_version");
    } catch (std::runtime_error const&) {
    }
    if (found != version)
        throw std::runtime_error("the file has version " + found + " of this op, the library version " + version +
                                 "; compile the model again with the keysieve that the library belongs to");
}

namespace {

Tensor tensor(ort::Api const& api, ort::Value const* value) {
    Tensor result;
    if (!value) return result;
    ort::ShapeInfo* info = nullptr;
    check(api, api.call(ort::kGetTensorTypeAndShape, value, &info));
    size_t rank = 0;
    ort::Status* status = api.call(ort::kGetDimensionsCount, static_cast<ort::ShapeInfo const*>(info), &rank);
    if (!status) {
        result.shape.resize(rank);
        status = api.call(ort::kGetDimensions, static_cast<ort::ShapeInfo const*>(info), result.shape.data(), rank);
    }
    api.release(ort::kReleaseShapeInfo, info);
    check(api, status);
    check(api, api.call(ort::kGetTensorMutableData, const_cast<ort::Value*>(value), &result.data));
    return result;
}

Tensor const& fitting(Tensor const& given, char const* name, Shape const& expected) {
    bool fits = given.shape.size() == expected.size();
    for (size_t axis = 0; fits && axis < expected.size(); ++axis)
        fits = expected[axis] == -1 || expected[axis] == given.shape[axis];
    if (!fits) throw std::runtime_error(std::string(name) + " is " + text(given.shape) + ", not " + text(expected));
    return given;
}

} // namespace

Context::Context(ort::Api const& api, ort::KernelContext* context) : api_(api), context_(context) {
    check(api_, api_.call(ort::kGetInputCount, static_cast<ort::KernelContext const*>(context_), &inputs_));
}

Tensor Context::any(size_t index) const {
    ort::Value const* value = nullptr;
    if (index < inputs_)
        check(api_, api_.call(ort::kGetInput, static_cast<ort::KernelContext const*>(context_), index, &value));
    return tensor(api_, value);
}

Tensor Context::input(size_t index, char const* name) const {
    Tensor const result = any(index);
    if (result.shape.empty()) throw std::runtime_error(std::string(name) + " is missing");
    return result;
}

Tensor Context::input(size_t index, char const* name, Shape const& expected) const {
    return fitting(input(index, name), name, expected);
}

Tensor Context::optional(size_t index, char const* name, Shape const& expected) const {
    Tensor const result = any(index);
    return result.shape.empty() ? result : fitting(result, name, expected);
}

Tensor Context::output(size_t index, Shape const& shape) const {
    ort::Value* value = nullptr;
    check(api_, api_.call(ort::kGetOutput, context_, index, shape.data(), shape.size(), &value));
    Tensor result{shape};
    check(api_, api_.call(ort::kGetTensorMutableData, value, &result.data));
    return result;
}

float* scratch(size_t slot, size_t floats) {
    struct alignas(64) Line { float floats[16]; };
    thread_local std::array<std::vector<Line>, 8> buffers;
    auto& buffer = buffers.at(slot);
    size_t const lines = (floats + 15) / 16;
    if (buffer.size() < lines) buffer.resize(lines);
    return buffer.empty() ? nullptr : buffer.data()->floats;
}

} // namespace keysieve
