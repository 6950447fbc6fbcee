// KeySieveUpdate: compact a cache by the plan, append the new rows. See keysieve.plugins.contract.
#pragma once

#include "cache.h"

namespace keysieve {

template <CacheType T> class Update {
public:
    explicit Update(Attributes const& attributes) : layer_(attributes.integer("layer")) {}

    void compute(Context& context) const {
        Tensor const key = context.input(5, "key", {-1, -1, -1, -1});
        int64_t const batches = key.shape[0], heads = key.shape[1], capacity = key.shape[2];
        Tensor const value = context.input(6, "value", {batches, heads, capacity, -1});
        Tensor const keyNew = context.input(0, "key_new", {batches, heads, -1, key.shape[3]});
        int64_t const tokens = keyNew.shape[2];
        Tensor const valueNew = context.input(1, "value_new", {batches, heads, tokens, value.shape[3]});
        Plan const plan = readPlan(context, 2, layer_, batches, heads, capacity, tokens);
        size_t const keyRow = static_cast<size_t>(key.shape[3]) * itemSize(T);
        size_t const valueRow = static_cast<size_t>(value.shape[3]) * itemSize(T);
        char* keys = inPlace(context, 0, key, itemSize(T));
        char* values = inPlace(context, 1, value, itemSize(T));
        compact(context, plan, batches, heads, capacity, keys, keyRow, values, valueRow);
        size_t const count = static_cast<size_t>(tokens);
        for (int64_t b = 0; b < batches; ++b)
            for (int64_t h = 0; h < heads; ++h) {
                size_t const head = static_cast<size_t>(b * heads + h);
                size_t const row = head * static_cast<size_t>(capacity) + static_cast<size_t>(plan.start(b));
                std::memcpy(keys + row * keyRow, keyNew.as<char>() + head * count * keyRow, count * keyRow);
                std::memcpy(values + row * valueRow, valueNew.as<char>() + head * count * valueRow, count * valueRow);
            }
    }

private:
    int64_t layer_;
};

} // namespace keysieve
