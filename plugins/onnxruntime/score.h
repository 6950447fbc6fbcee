// KeySieveScore: how important every cached key is; nothing unless a sequence is due. See keysieve.plugins.contract.
#pragma once

#include "cache.h"

#include <atomic>

namespace keysieve {

enum class Policy { kTrig, kKeyNorm, kStreaming, kRandom };

Policy policyOf(std::string const& name);

// The hash of (position, row, head, layer) that keysieve.kernels.reference.score describes, in [0, 1).
float randomScore(int64_t position, int64_t row, int64_t head, int64_t layer);

template <CacheType T> class Score {
public:
    explicit Score(Attributes const& attributes)
        : policy_(policyOf(attributes.string("policy"))), queryHeads_(attributes.integer("query_heads")),
          rotary_(attributes.integer("rotary_dim")), interleaved_(attributes.integer("interleaved")) {}

    void compute(Context& context) const {
        int64_t const layers = static_cast<int64_t>(context.inputs()) - kKeys;
        Tensor const first = context.input(kKeys, "key", {-1, -1, -1, -1});
        int64_t const batches = first.shape[0], heads = first.shape[1], capacity = first.shape[2], dim = first.shape[3];
        Tensor const length = context.input(0, "length", {batches}), limit = context.input(1, "limit", {batches});
        Tensor const scores = context.output(0, {layers, batches, queryHeads_, capacity});
        int32_t const *held = length.as<int32_t>(), *due = limit.as<int32_t>();
        bool any = false;
        for (int64_t b = 0; b < batches; ++b) {
            any |= held[b] >= due[b];
            if (held[b] > capacity) throw std::runtime_error("a sequence holds more rows than the capacity");
        }
        if (!any) return; // what the scores then are has no meaning

        Tensor const position = context.input(2, "position", {batches});
        bool const trig = policy_ == Policy::kTrig;
        Tensor const centre = trig ? context.input(3, "centre", {layers, batches, queryHeads_, -1, dim}) : Tensor{};
        Tensor const weight = trig ? context.input(4, "weight", {layers, batches, queryHeads_, rotary_ / 2}) : Tensor{};
        std::vector<Tensor> keys;
        for (int64_t l = 0; l < layers; ++l)
            keys.push_back(context.input(static_cast<size_t>(kKeys + l), "key", first.shape));
        int64_t const group = queryHeads_ / heads, offsets = trig ? centre.shape[3] : 1;
        Kernels const& k = kernels();
        context.parallel(static_cast<size_t>(layers * batches * heads), [&](size_t index) {
            int64_t const l = static_cast<int64_t>(index) / (batches * heads);
            int64_t const b = static_cast<int64_t>(index) / heads % batches, h = static_cast<int64_t>(index) % heads;
            if (held[b] < due[b]) return;
            int64_t const query = (l * batches + b) * queryHeads_ + h * group;
            float* out = scores.as<float>() + query * capacity;
            size_t const rows = static_cast<size_t>((b * heads + h) * capacity * dim);
            void const* key = keys[static_cast<size_t>(l)].template as<char>() + rows * itemSize(T);
            if (trig) {
                Centres const c = {centre.as<float>() + query * offsets * dim, weight.as<float>() + query * (rotary_ / 2),
                                   group, offsets, dim, rotary_, interleaved_ != 0};
                k.scoreTrig[T](key, held[b], c, out, capacity);
                return;
            }
            if (policy_ == Policy::kKeyNorm) k.scoreNorm[T](key, held[b], dim, out);
            for (int64_t g = 0; g < group; ++g)
                for (int64_t row = 0; row < held[b]; ++row) {
                    float& score = out[g * capacity + row];
                    if (policy_ == Policy::kKeyNorm) score = out[row];
                    else if (policy_ == Policy::kStreaming) score = static_cast<float>(row);
                    else score = randomScore(position.as<int64_t>()[b], row, h * group + g, l);
                }
        });
    }

private:
    static constexpr int64_t kKeys = 5; // the place of the first key
    Policy policy_;
    int64_t queryHeads_, rotary_, interleaved_;
};

} // namespace keysieve
