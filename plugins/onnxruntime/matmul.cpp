#include "matmul.h"

#include "kernels.h"

namespace keysieve {

void MatMul::compute(Context& context) const {
    Tensor const weight = context.input(1, "weight", {-1, -1});
    int64_t const rows = weight.shape[0], depth = weight.shape[1];
    Tensor const x = context.input(0, "x");
    int64_t const tokens = rowsOf(x, "x", depth);
    Shape shape = x.shape;
    shape.back() = rows;
    float* y = context.output(0, shape).as<float>();
    if (!tokens || !rows) return;
    Kernels const& k = kernels();
    int64_t const parts = partsOf(rows);
    context.parallel(static_cast<size_t>(parts), [&](size_t part) {
        float* work = scratch(0, static_cast<size_t>(k.matmulWork(tokens)));
        k.matmul(weight.as<float>(), rows, depth, static_cast<int64_t>(part), parts, x.as<float>(), tokens, work, y);
    });
}

} // namespace keysieve
