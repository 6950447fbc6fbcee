// The entry point that ONNX Runtime calls, and the list of ops. Each is there once for every dtype of a cache.

#include "attend.h"
#include "linear.h"
#include "matmul.h"
#include "score.h"
#include "select.h"
#include "update.h"

#include <mutex>

namespace keysieve {

namespace {

constexpr char kDomain[] = "trt.plugins";

template <CacheType T> constexpr ort::ElementType elementType() {
    return T == kCacheFloat ? ort::kFloat : T == kCacheFloat16 ? ort::kFloat16 : ort::kBFloat16;
}

template <CacheType T> std::vector<ort::CustomOp*> opsOf() {
    constexpr Port cache{elementType<T>()}, i32{ort::kInt32}, i64{ort::kInt64}, f32{ort::kFloat};
    constexpr Port optional{ort::kFloat, ort::kOptional}, keys{elementType<T>(), ort::kVariadic};
    static Op<Update<T>> update("KeySieveUpdate", "1", {cache, cache, i32, i32, i32, cache, cache}, {cache, cache});
    static Op<Attend<T>> attend("KeySieveAttend", "2",
                                {f32, optional, optional, i32, i32, i32, cache, cache, optional, optional, optional},
                                {f32, cache, cache});
    static Op<Score<T>> score("KeySieveScore", "1", {i32, i32, i64, f32, f32, keys}, {f32});
    return {&update, &attend, &score};
}

std::vector<ort::CustomOp*> allOps() {
    constexpr Port f32{ort::kFloat}, i32{ort::kInt32}, u8{ort::kUInt8}, optional{ort::kFloat, ort::kOptional};
    static Op<Select> select("KeySieveSelect", "2", {f32, i32, i32, i32, i32, optional}, {i32, i32, i32});
    static Op<Linear> linear("KeySieveLinear", "2", {f32, u8, f32, u8, optional, optional}, {f32});
    static Op<MatMul> matmul("KeySieveMatMul", "2", {f32, f32, optional, optional}, {f32});
    std::vector<ort::CustomOp*> ops{&select, &linear, &matmul};
    for (auto const& some : {opsOf<kCacheFloat>(), opsOf<kCacheFloat16>(), opsOf<kCacheBFloat16>()})
        ops.insert(ops.end(), some.begin(), some.end());
    return ops;
}

} // namespace

} // namespace keysieve

extern "C" __attribute__((visibility("default"))) keysieve::ort::Status*
RegisterCustomOps(keysieve::ort::SessionOptions* options, keysieve::ort::ApiBase const* base) {
    using namespace keysieve;
    ort::Api const* api = base->api(ort::kApiVersion);
    if (!api) {
        std::string const message = "keysieve's ops need API version " + std::to_string(ort::kApiVersion) +
                                    " of ONNX Runtime (release 1.18); this is ONNX Runtime " + base->version();
        return base->api(1)->error(ort::kFail, message.c_str());
    }
    static std::mutex mutex;
    static ort::Domain* made = nullptr; // lives as long as the process: sessions refer to it
    std::lock_guard<std::mutex> const lock(mutex);
    if (!made) {
        ort::Domain* domain = nullptr;
        if (ort::Status* status = api->call(ort::kCreateCustomOpDomain, static_cast<char const*>(kDomain), &domain))
            return status;
        for (ort::CustomOp* op : allOps())
            if (ort::Status* status = api->call(ort::kCustomOpDomainAdd, domain, static_cast<ort::CustomOp const*>(op)))
                return status;
        made = domain;
    }
    return api->call(ort::kAddCustomOpDomain, options, made);
}
