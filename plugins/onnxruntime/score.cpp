#include "score.h"

namespace keysieve {

Policy policyOf(std::string const& name) {
    if (name == "trig") return Policy::kTrig;
    if (name == "key_norm") return Policy::kKeyNorm;
    if (name == "streaming") return Policy::kStreaming;
    if (name == "random") return Policy::kRandom;
    throw std::runtime_error("unknown score policy '" + name + "'");
}

float randomScore(int64_t position, int64_t row, int64_t head, int64_t layer) {
    int64_t x = (position % 4093 * 1009 + row * 1013 + head * 31 + layer * 17) % 65521;
    for (int round = 0; round < 2; ++round) x = (x * x + 12289) % 65521;
    return static_cast<float>(x) / 65521.0f;
}

} // namespace keysieve
