#include "cache.h"

#include <atomic>

namespace keysieve {

Plan readPlan(Context const& context, size_t place, int64_t layer, int64_t batches, int64_t heads, int64_t capacity,
              int64_t tokens) {
    Tensor const length = context.input(place, "length", {batches});
    Tensor const rows = context.input(place + 1, "plan", {-1, batches, -1, capacity});
    Tensor const keep = context.input(place + 2, "keep", {batches});
    Plan const plan = {rows.shape[0], rows.shape[2], capacity, rows.as<int32_t>(), keep.as<int32_t>(),
                       length.as<int32_t>(), layer};
    if (plan.heads != 1 && plan.heads != heads)
        throw std::runtime_error("plan is " + text(rows.shape) + " and the cache has " + std::to_string(heads) + " heads");
    for (int64_t b = 0; b < batches; ++b) {
        if (plan.length[b] < 0 || plan.length[b] > capacity || plan.keep[b] > plan.length[b] ||
            plan.start(b) + tokens > capacity)
            throw std::runtime_error("sequence " + std::to_string(b) + " holds " + std::to_string(plan.length[b]) +
                                     " rows, keeps " + std::to_string(plan.keep[b]) + " and gets " +
                                     std::to_string(tokens) + " new ones; the capacity is " + std::to_string(capacity));
    }
    return plan;
}

char* inPlace(Context const& context, size_t place, Tensor const& cache, size_t item) {
    Tensor const output = context.output(place, cache.shape);
    if (output.data != cache.data) {
        size_t count = item;
        for (int64_t size : cache.shape) count *= static_cast<size_t>(size);
        std::memcpy(output.data, cache.data, count);
    }
    return output.as<char>();
}

namespace {

// Rows that follow each other move together.
bool move(int32_t const* plan, int64_t keep, int64_t held, char* rows, size_t size) {
    for (int64_t row = 0; row < keep;) {
        int64_t next = row + 1;
        while (next < keep && plan[next] == plan[row] + (next - row)) ++next;
        int64_t const last = plan[row] + (next - row) - 1;
        if (plan[row] < row || last >= held) return false;
        if (plan[row] != row)
            std::memmove(rows + static_cast<size_t>(row) * size, rows + static_cast<size_t>(plan[row]) * size,
                         static_cast<size_t>(next - row) * size);
        row = next;
    }
    return true;
}

} // namespace

void compact(Context const& context, Plan const& plan, int64_t batches, int64_t heads, int64_t capacity, char* key,
             size_t keyRow, char* value, size_t valueRow) {
    if (std::all_of(plan.keep, plan.keep + batches, [](int32_t keep) { return keep < 0; })) return;
    std::atomic<bool> fine{true};
    context.parallel(static_cast<size_t>(batches * heads), [&](size_t index) {
        int64_t const b = static_cast<int64_t>(index) / heads, h = static_cast<int64_t>(index) % heads;
        int32_t const* rows = plan.of(b, batches, h);
        size_t const first = index * static_cast<size_t>(capacity);
        bool const moved = move(rows, plan.keep[b], plan.length[b], key + first * keyRow, keyRow) &&
                           move(rows, plan.keep[b], plan.length[b], value + first * valueRow, valueRow);
        if (!moved) fine = false;
    });
    if (!fine) throw std::runtime_error("the plan moves a row backwards, or keeps rows that are not held");
}

} // namespace keysieve
