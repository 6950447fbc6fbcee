// The inner loops, compiled once for every instruction set; the ops call those that the processor has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace keysieve {

enum CacheType : int { kCacheFloat, kCacheFloat16, kCacheBFloat16, kCacheTypes };

inline size_t itemSize(CacheType type) { return type == kCacheFloat ? 4 : 2; }

// The keys and values of one KV head.
struct Head {
    void const* key;   // [rows, keyDim]
    void const* value; // [rows, valueDim]
    int64_t keyDim, valueDim;
};

// Queries [count, keyDim], scaled; query q sees the rows [first[q], end[q]), both ascending in q.
struct Queries {
    float const* data;
    int64_t count;
    int64_t const *first, *end;
    float softcap; // 0: none
};

// Softmax not yet divided: read [count, valueDim] is relative to the highest logit `top`, whose weights sum to `sum`.
struct Partial {
    float *read, *top, *sum;
};

struct Centres {
    float const* centre; // [group, offsets, dim]
    float const* weight; // [group, rotary / 2]
    int64_t group, offsets, dim, rotary;
    bool interleaved;
};

// Weights of 4 or 8 bits, in blocks of kBlock that share a scale and a zero, as MatMulNBits has them: the first of two
// in a byte has its low bits, and a row's zeros fill whole bytes.
constexpr int64_t kBlock = 32;
struct Integers {
    uint8_t const* weight; // [rows, blocks, kBlock * bits / 8]
    float const* scale;    // [rows, blocks]
    uint8_t const* zero;   // [rows, (blocks * bits + 7) / 8]
    int64_t rows, blocks, bits;
};

// Activations as integers of 8 bits, four in each of these; with weights of 4 bits, a block's even ones come first.
struct Rounded {
    int32_t const* integers; // [tokens, blocks, kBlock / 4]
    float const* scale;      // [tokens, blocks]
    float const* total;      // the sum of the block's integers, times its scale
    float* alone;            // one token: the same as arrange() lays it out; of more, null
};

// What is called work, and what arrange() writes, is aligned to 64 bytes.
struct Kernels {
    char const* name;
    // Floats to rows of a cache.
    void (*store[kCacheTypes])(float const* from, void* to, int64_t count);
    // x [dim] turned: x * cosine + rotated half of x * sine, times factor.
    void (*rotate)(float const* x, float const* cosine, float const* sine, float factor, float* to, int64_t dim);
    // Attention of a few queries that see the same rows; work: floats, fewWork() of them.
    void (*attendFew[kCacheTypes])(Head const&, Queries const&, Partial const&, float* work);
    // Attention of many queries; work: manyWork() floats.
    void (*attendMany[kCacheTypes])(Head const&, Queries const&, Partial const&, float* work);
    // scores [group, stride] of rows 0 .. rows - 1
    void (*scoreTrig[kCacheTypes])(void const* key, int64_t rows, Centres const&, float* scores, int64_t stride);
    void (*scoreNorm[kCacheTypes])(void const* key, int64_t rows, int64_t dim, float* scores);
    // standard [rows]: raised to how many standard deviations each score is above their mean, where that is more;
    // scores that are not finite neither count nor raise.
    void (*standardise)(float const* scores, int64_t rows, float* standard);
    // The rank-th highest of values, none of which is NaN; rank is 1 or more, and at most `rows`.
    float (*ranked)(float const* values, int64_t rows, int64_t rank);
    // An RMS norm: x [dim] / sqrt(mean of squares + epsilon) * weight.
    void (*normalise)(float const* x, float const* weight, float epsilon, int64_t dim, float* to);
    // One token's x [depth] as integers, or where `times` is given, silu(x) * times; zeros fill the last block.
    void (*roundBlocks)(float const* x, float const* times, int64_t depth, int64_t bits, int32_t* integers, float* scale,
                        float* total);
    // One token in the order of the weights of a row; to: arrangedSize() floats.
    void (*arrange)(Rounded const&, int64_t blocks, int64_t bits, float* to);
    int64_t (*arrangedSize)(int64_t blocks, int64_t bits);
    // y [tokens, w.rows]: one of `parts` of its columns, added to those of `onto` unless that is null; work:
    // linearWork() floats.
    void (*linear)(Integers const& w, int64_t part, int64_t parts, Rounded const&, int64_t tokens, float const* onto,
                   float* work, float* y);
    int64_t (*linearWork)(int64_t blocks);
    // The same with weight [rows, depth] and x [tokens, depth], both floats; work: matmulWork() floats.
    void (*matmul)(float const* weight, int64_t rows, int64_t depth, int64_t part, int64_t parts, float const* x,
                   int64_t tokens, float const* onto, float* work, float* y);
    int64_t (*matmulWork)(int64_t tokens);
    int64_t (*fewWork)(int64_t queries, int64_t rows);
    int64_t (*manyWork)(int64_t queries, int64_t keyDim, int64_t valueDim);
};

// Null where it was not compiled for this processor family.
Kernels const* avx512vnniKernels();
Kernels const* avx512Kernels();
Kernels const* avx2Kernels();
Kernels const* portableKernels();

// Those in use: the fastest that the processor has.
Kernels const& kernels();

} // namespace keysieve
