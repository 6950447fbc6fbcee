// What the ops share: checked access to inputs, outputs and attributes, and the glue to ONNX Runtime.
#pragma once

#include "api.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace keysieve {

using Shape = std::vector<int64_t>;

std::string text(Shape const& shape);

// Raises std::runtime_error with ONNX Runtime's own words.
void check(ort::Api const& api, ort::Status* status);

struct Tensor {
    Shape shape;
    void* data = nullptr;

    explicit operator bool() const { return data != nullptr; }
    template <typename T> T* as() const { return static_cast<T*>(data); }
};

// How many elements there are.
int64_t count(Shape const& shape);

// The first sizes of x [..., width], or of x [B,S,H,D] with heads that make up the width; raises std::runtime_error where
// it is neither.
Shape leading(Tensor const& x, char const* name, int64_t width);

// Into how many parts a product with so many rows of weights is divided for the threads.
int64_t partsOf(int64_t rows);

class Attributes {
public:
    Attributes(ort::Api const& api, ort::KernelInfo const* info) : api_(api), info_(info) {}
    int64_t integer(char const* name) const;
    float real(char const* name) const;
    std::string string(char const* name) const;
    // Raises std::runtime_error where the node says that it is of another version of its op.
    void expectVersion(std::string const& version) const;

private:
    ort::Api const& api_;
    ort::KernelInfo const* info_;
};

class Context {
public:
    Context(ort::Api const& api, ort::KernelContext* context);
    size_t inputs() const { return inputs_; }
    // Raises std::runtime_error where it is missing.
    Tensor input(size_t index, char const* name) const;
    // Raises std::runtime_error where the shape is not the expected one; -1 takes any size.
    Tensor input(size_t index, char const* name, Shape const& expected) const;
    // The same of an input that may be left out.
    Tensor optional(size_t index, char const* name, Shape const& expected) const;
    Tensor output(size_t index, Shape const& shape) const;

    // function(0 .. count-1) on ONNX Runtime's own threads.
    template <typename Function> void parallel(size_t count, Function const& function) const {
        if (count == 1) return function(size_t{0});
        auto trampoline = [](void* f, size_t index) { (*static_cast<Function const*>(f))(index); };
        check(api_, api_.call(ort::kParallelFor, static_cast<ort::KernelContext const*>(context_),
                              static_cast<void (*)(void*, size_t)>(trampoline), count, size_t{0},
                              static_cast<void*>(const_cast<Function*>(&function))));
    }

private:
    // Empty where an optional input is left out.
    Tensor any(size_t index) const;

    ort::Api const& api_;
    ort::KernelContext* context_;
    size_t inputs_ = 0;
};

// A buffer of the calling thread that only grows: no allocation in a step that is like the one before.
// Every `slot` is a buffer of its own; it begins where a vector of any width may.
float* scratch(size_t slot, size_t floats);

// One input or output of an op.
struct Port {
    ort::ElementType type;
    ort::Characteristic characteristic = ort::kRequired;
};

// An op that ONNX Runtime can hold: Kernel(Attributes) has compute(Context&). Its version is that of keysieve.plugins.contract.
template <typename Kernel> struct Op : ort::CustomOp {
    char const *opName, *version;
    std::vector<Port> ins, outs;

    Op(char const* theName, char const* theVersion, std::vector<Port> theInputs, std::vector<Port> theOutputs)
        : opName(theName), version(theVersion), ins(std::move(theInputs)), outs(std::move(theOutputs)) {
        using ort::CustomOp;
        name = [](CustomOp const* op) { return self(op).opName; };
        provider = [](CustomOp const*) -> char const* { return nullptr; }; // the CPU
        inputType = [](CustomOp const* op, size_t i) { return self(op).ins[i].type; };
        inputCount = [](CustomOp const* op) { return self(op).ins.size(); };
        outputType = [](CustomOp const* op, size_t i) { return self(op).outs[i].type; };
        outputCount = [](CustomOp const* op) { return self(op).outs.size(); };
        inputCharacteristic = [](CustomOp const* op, size_t i) { return self(op).ins[i].characteristic; };
        outputCharacteristic = [](CustomOp const* op, size_t i) { return self(op).outs[i].characteristic; };
        inputMemory = [](CustomOp const*, size_t) { return 0; };
        variadicInputs = [](CustomOp const*) { return 1; };
        variadicInputsAlike = [](CustomOp const*) { return 1; };
        startVersion = [](CustomOp const*) { return 1; };
        endVersion = [](CustomOp const*) { return 0x7fffffff; };
        destroy = [](void* state) { delete static_cast<State*>(state); };
        createKernelV2 = [](CustomOp const* op, ort::Api const* api, ort::KernelInfo const* info, void** state) {
            return guarded(*api, self(op).opName, [&] {
                Attributes const attributes(*api, info);
                attributes.expectVersion(self(op).version);
                *state = new State{*api, self(op).opName, Kernel(attributes)};
            });
        };
        computeV2 = [](void* opaque, ort::KernelContext* context) {
            auto& state = *static_cast<State*>(opaque);
            return guarded(state.api, state.name, [&] {
                Context wrapped(state.api, context);
                state.kernel.compute(wrapped);
            });
        };
    }

private:
    struct State {
        ort::Api const& api;
        char const* name;
        Kernel kernel;
    };

    static Op const& self(ort::CustomOp const* op) { return *static_cast<Op const*>(op); }

    // No exception may pass through ONNX Runtime's C interface.
    template <typename Function> static ort::Status* guarded(ort::Api const& api, char const* name, Function const& f) {
        try {
            f();
            return nullptr;
        } catch (std::exception const& error) {
            return api.error(ort::kInvalidArgument, (std::string(name) + ": " + error.what()).c_str());
        }
    }
};

} // namespace keysieve
