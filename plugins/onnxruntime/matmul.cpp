#include "matmul.h"

#include "kernels.h"

namespace keysieve {

void MatMul::compute(Context& context) const {
    Tensor const weight = context.input(1, "weight", {-1, -1});
    int64_t const rows = weight.shape[0], depth = weight.shape[1];
    Tensor const x = context.input(0, "x");
    Shape shape = leading(x, "x", depth);
    int64_t const tokens = count(shape);
    shape.push_back(rows);
    Tensor const norm = context.optional(2, "norm", {depth}), residual = context.optional(3, "residual", shape);
    float* y = context.output(0, shape).as<float>();
    if (!tokens || !rows) return;
    Kernels const& k = kernels();
    float const* from = x.as<float>();
    if (norm) {
        float* normal = scratch(1, static_cast<size_t>(tokens * depth));
        context.parallel(static_cast<size_t>(tokens), [&](size_t token) {
            int64_t const at = static_cast<int64_t>(token) * depth;
            k.normalise(x.as<float>() + at, norm.as<float>(), epsilon_, depth, normal + at);
        });
        from = normal;
    }
    int64_t const parts = partsOf(rows);
    context.parallel(static_cast<size_t>(parts), [&](size_t part) {
        float* work = scratch(0, static_cast<size_t>(k.matmulWork(tokens)));
        k.matmul(weight.as<float>(), rows, depth, static_cast<int64_t>(part), parts, from, tokens, residual.as<float>(), work, y);
    });
}

} // namespace keysieve
