// KeySieveAttend: KeySieveUpdate, RoPE of the new queries and keys, and attention over the cache, in one node.
//
// query [B,S,Hq,D], key_new [B,S,Hkv,D], value_new [B,S,Hkv,Dv]: float, before RoPE where cosine and sine [B,S,D] are
// given (half-split), or all of a token behind each other in query [B,S,Hq*D + Hkv*D + Hkv*Dv]; length, plan, keep, key,
// value as in KeySieveUpdate; sinks [Hq]: logits of attention sinks.
// Where the cache is for some KV heads of the layer (attribute heads, "0,2"), query, key_new and value_new still bring
// those of all of them, kv_heads in number; sinks and read are of the query heads of its own.
// Outputs: read [B,S,Hq,Dv], key_out, value_out. Token s sees the rows up to its own, the last `window` of them (0: all).
#pragma once

#include "cache.h"

namespace keysieve {

// Attention of `tokens` new tokens a sequence; see attend.cpp.
struct AttendShape {
    int64_t batches, tokens, queryHeads, heads, capacity, keyDim, valueDim;
};
void attend(Context const& context, CacheType type, AttendShape const& shape, Plan const& plan, float const* queries,
            char const* keys, char const* values, float const* sinks, int64_t window, float softcap, float* read);

// What the new tokens bring: for each a row of all its heads, and how far the next one's is.
struct NewRows {
    float const *query, *key, *value;
    int64_t queryStride, keyStride, valueStride, tokens, queryHeads;
};
// The inputs query, key_new and value_new, together in the first or each by itself. key: the expected shape of key_new.
NewRows newRows(Context const& context, Shape const& key, int64_t valueDim);

// "0,2" -> {0, 2}.
std::vector<int64_t> numbers(std::string const& text);

template <CacheType T> class Attend {
public:
    explicit Attend(Attributes const& attributes)
        : layer_(attributes.integer("layer")), window_(attributes.integer("window")), scale_(attributes.real("scale")),
          softcap_(attributes.real("softcap")), kvHeads_(attributes.integer("kv_heads")),
          heads_(numbers(attributes.string("heads"))) {
        for (int64_t head : heads_)
            if (head < 0 || head >= kvHeads_) throw std::runtime_error("attribute heads names a head beyond kv_heads");
    }

    void compute(Context& context) const {
        Tensor const key = context.input(6, "key", {-1, -1, -1, -1});
        int64_t const batches = key.shape[0], heads = key.shape[1], capacity = key.shape[2], dim = key.shape[3];
        Tensor const value = context.input(7, "value", {batches, heads, capacity, -1});
        int64_t const valueDim = value.shape[3];
        bool const some = !heads_.empty();
        if (some && heads != static_cast<int64_t>(heads_.size()))
            throw std::runtime_error("the cache has another number of heads than the attribute heads");
        int64_t const all = some ? kvHeads_ : heads;
        NewRows const given = newRows(context, {batches, -1, all, dim}, valueDim);
        int64_t const tokens = given.tokens, group = given.queryHeads / all, queryHeads = group * heads;
        auto layerHead = [&](int64_t h) { return some ? heads_[static_cast<size_t>(h)] : h; };
        Tensor const cosine = context.optional(8, "cosine", {batches, tokens, dim});
        bool const rotated = static_cast<bool>(cosine);
        Tensor const sine = rotated ? context.input(9, "sine", {batches, tokens, dim}) : Tensor{};
        Tensor const sinks = context.optional(10, "sinks", {queryHeads});
        Plan const plan = readPlan(context, 3, layer_, batches, heads, capacity, tokens);
        Tensor const read = context.output(0, {batches, tokens, queryHeads, valueDim});
        char* keys = inPlace(context, 1, key, itemSize(T));
        char* values = inPlace(context, 2, value, itemSize(T));
        size_t const keyRow = static_cast<size_t>(dim) * itemSize(T), valueRow = static_cast<size_t>(valueDim) * itemSize(T);
        compact(context, plan, batches, heads, capacity, keys, keyRow, values, valueRow);

        Kernels const& k = kernels();
        float* turned = scratch(0, static_cast<size_t>(dim));
        float* queries = scratch(1, static_cast<size_t>(batches * tokens * queryHeads * dim)); // [B,Hkv,S,G,D]
        for (int64_t b = 0; b < batches; ++b)
            for (int64_t s = 0; s < tokens; ++s) {
                int64_t const token = b * tokens + s;
                float const* c = rotated ? cosine.as<float>() + token * dim : nullptr;
                float const* i = rotated ? sine.as<float>() + token * dim : nullptr;
                for (int64_t h = 0; h < queryHeads; ++h) {
                    float const* from = given.query + token * given.queryStride
                                        + (layerHead(h / group) * group + h % group) * dim;
                    float* to = queries + (((b * heads + h / group) * tokens + s) * group + h % group) * dim;
                    if (rotated) k.rotate(from, c, i, scale_, to, dim);
                    else for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * scale_;
                }
                for (int64_t h = 0; h < heads; ++h) {
                    float const* from = given.key + token * given.keyStride + layerHead(h) * dim;
                    if (rotated) k.rotate(from, c, i, 1.0f, turned, dim), from = turned;
                    size_t const row = static_cast<size_t>((b * heads + h) * capacity + plan.start(b) + s);
                    k.store[T](from, keys + row * keyRow, dim);
                    float const* newValue = given.value + token * given.valueStride + layerHead(h) * valueDim;
                    k.store[T](newValue, values + row * valueRow, valueDim);
                }
            }
        AttendShape const shape = {batches, tokens, queryHeads, heads, capacity, dim, valueDim};
        attend(context, T, shape, plan, queries, keys, values, sinks.as<float>(), window_, softcap_, read.as<float>());
    }

private:
    int64_t layer_, window_;
    float scale_, softcap_;
    int64_t kvHeads_;
    std::vector<int64_t> heads_; // of the layer's, those of the cache; empty for all
};

} // namespace keysieve
