#include "linear.h"

#include "kernels.h"

namespace keysieve {

void Linear::compute(Context& context) const {
    Tensor const x = context.input(0, "x");
    int64_t const width = gated_ ? 2 * depth_ : depth_, blocks = (depth_ + kBlock - 1) / kBlock;
    Shape shape = leading(x, "x", width);
    int64_t const tokens = count(shape);
    shape.push_back(rows_);
    Tensor const weight = context.input(1, "weight");
    if (weight.shape[0] != rows_ || count(weight.shape) != rows_ * blocks * kBlock * bits_ / 8)
        throw std::runtime_error("weight is " + text(weight.shape) + ", not " + text({rows_, blocks, kBlock * bits_ / 8}));
    Tensor const scale = context.input(2, "scale", {rows_, blocks});
    Tensor const zero = context.input(3, "zero", {rows_, (blocks * bits_ + 7) / 8});
    Tensor const norm = context.optional(4, "norm", {depth_}), residual = context.optional(5, "residual", shape);
    if (norm && gated_) throw std::runtime_error("x cannot be gated and normalised");
    float* y = context.output(0, shape).as<float>();
    if (!tokens) return;

    Kernels const& k = kernels();
    size_t const all = static_cast<size_t>(tokens * blocks);
    int32_t* integers = reinterpret_cast<int32_t*>(scratch(0, all * kBlock / 4));
    float *scales = scratch(1, all), *totals = scratch(2, all);
    context.parallel(static_cast<size_t>(tokens), [&](size_t token) {
        int64_t const t = static_cast<int64_t>(token), at = t * blocks;
        float const *first = x.as<float>() + t * width, *second = gated_ ? first + depth_ : nullptr;
        if (norm) {
            float* row = scratch(5, static_cast<size_t>(depth_));
            k.normalise(first, norm.as<float>(), epsilon_, depth_, row);
            first = row;
        }
        k.roundBlocks(first, second, depth_, bits_, integers + at * kBlock / 4, scales + at, totals + at);
    });
    Integers const w = {weight.as<uint8_t>(), scale.as<float>(), zero.as<uint8_t>(), rows_, blocks, bits_};
    Rounded rounded = {integers, scales, totals, nullptr};
    if (tokens == 1) {
        rounded.alone = scratch(4, static_cast<size_t>(k.arrangedSize(blocks, bits_)));
        k.arrange(rounded, blocks, bits_, rounded.alone);
    }
    int64_t const parts = partsOf(rows_);
    context.parallel(static_cast<size_t>(parts), [&](size_t part) {
        float* work = scratch(3, static_cast<size_t>(k.linearWork(blocks)));
        k.linear(w, static_cast<int64_t>(part), parts, rounded, tokens, residual.as<float>(), work, y);
    });
}

} // namespace keysieve
