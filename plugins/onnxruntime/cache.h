// What KeySieveUpdate and KeySieveAttend share: compacting a cache by the plan, and where new rows go.
#pragma once

#include "kernels.h"
#include "op.h"

#include <cstring>

namespace keysieve {

struct Plan {
    int64_t layers, heads, capacity; // 1 where it is shared by layers or heads
    int32_t const *rows, *keep, *length;
    int64_t layer;

    // The rows that stay, of one sequence and KV head.
    int32_t const* of(int64_t batch, int64_t batches, int64_t head) const {
        int64_t const l = std::min(layer, layers - 1), h = std::min(head, heads - 1);
        return rows + ((l * batches + batch) * heads + h) * capacity;
    }

    // The row of the first new token.
    int64_t start(int64_t batch) const { return keep[batch] >= 0 ? keep[batch] : length[batch]; }
};

// The inputs length, plan and keep, at that place and the next two. Raises std::runtime_error for shapes that do not
// fit, and where `tokens` more rows, or the plan, do not fit the capacity.
Plan readPlan(Context const& context, size_t place, int64_t layer, int64_t batches, int64_t heads, int64_t capacity,
              int64_t tokens);

// A cache [batches, heads, capacity, dim]: output `place` of the op, in the very memory of the input where that is bound
// to it, else copied there.
char* inPlace(Context const& context, size_t place, Tensor const& cache, size_t item);

// Move the planned rows of both caches to the front. Raises std::runtime_error for a plan that moves a row backwards, or keeps rows that are not held.
void compact(Context const& context, Plan const& plan, int64_t batches, int64_t heads, int64_t capacity, char* key,
             size_t keyRow, char* value, size_t valueRow);

} // namespace keysieve
