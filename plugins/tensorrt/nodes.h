// The contract's shapes, dtypes, aliases and workspaces, and the launches of each node: pure functions of sizes.
//
// Axes: B batch, S new tokens, C capacity, L layers, Hq/Hkv heads, D head dim, J rows of a centre, R rotary dim,
// Lp = 1 or L and Hp = 1 or Hkv (a plan shared by layers or heads). plugins/contract.py has the meaning.
#pragma once

#include "configuration.h"
#include "kernels.h"

#include <string>
#include <vector>

namespace keysieve {

constexpr int64_t kMaxCapacity = 65536;
constexpr int64_t kUnknown = -1; // a size that TensorRT does not know yet

using Shape = std::vector<int64_t>;
using Types = std::vector<nvinfer1::DataType>;

namespace update {
enum Input { kKeyNew, kValueNew, kLength, kPlan, kKeep, kKey, kValue, kInputs };
enum Output { kKeyOut, kValueOut, kOutputs };
int32_t aliasedInput(int32_t output);
size_t cacheBytes(Configuration const& built, Shape const& cache);
Types inputTypes(Configuration const& built);
void check(Configuration const& built, std::vector<Shape> const& inputs, int32_t layer);
Launch launch(std::vector<Shape> const& inputs, void const* const* in, void* const* out, int32_t layer);
} // namespace update

namespace score {
enum Input { kLength, kLimit, kPosition, kCentre, kWeight, kKey };
Types inputTypes(Configuration const& built);
void check(Configuration const& built, std::vector<Shape> const& inputs, std::string const& policy, int32_t queryHeads,
    int32_t rotaryDim, int32_t interleaved);
Launch launch(std::vector<Shape> const& inputs, DevicePointer keys, void const* const* in, void* const* out);
} // namespace score

namespace select {
enum Input { kScores, kLength, kLimit, kBudget, kPinned, kInputs };
enum Output { kPlan, kKeep, kEvicted, kOutputs };
Types inputTypes();
void check(Configuration const& built, std::vector<Shape> const& inputs, std::string const& scope, int32_t kvHeads,
    int32_t sinks, int32_t recent);
size_t statsBytes(Configuration const& built, int64_t batch);
size_t workspaceBytes(Configuration const& built, int64_t batch, int64_t capacity);
std::vector<Launch> launches(Configuration const& built, std::vector<Shape> const& inputs, void const* const* in,
    void* const* out, void* workspace);
} // namespace select

} // namespace keysieve
