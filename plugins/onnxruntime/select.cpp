#include "select.h"

#include "kernels.h"

#include <cmath>
#include <limits>

namespace keysieve {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The `kept` best of value [rows], as ascending row numbers; the lower row wins a tie.
void best(float const* value, int64_t rows, int64_t kept, int32_t* plan) {
    if (kept <= 0) return;
    float const threshold = kernels().ranked(value, rows, kept);
    int64_t ties = kept;
    for (int64_t row = 0; row < rows; ++row) ties -= value[row] > threshold;
    for (int64_t row = 0; row < rows; ++row) {
        bool const tie = value[row] == threshold && ties > 0;
        ties -= tie;
        if (tie || value[row] > threshold) *plan++ = static_cast<int32_t>(row);
    }
}

} // namespace

struct Select::Sequence {
    int64_t length, kept, capacity;
    int64_t front, back; // candidates are the rows between
};

Select::Select(Attributes const& attributes)
    : heads_(attributes.integer("kv_heads")), sinks_(static_cast<int32_t>(attributes.integer("sinks"))),
      recent_(static_cast<int32_t>(attributes.integer("recent"))) {
    std::string const scope = attributes.string("scope");
    if (scope == "per_layer_per_head") scope_ = Scope::kPerLayerPerHead;
    else if (scope == "per_head") scope_ = Scope::kPerHead;
    else if (scope == "union") scope_ = Scope::kUnion;
    else throw std::runtime_error("unknown scope '" + scope + "'");
}

void Select::standardise(Sequence const& s, float const* scores, int64_t group, float* z) const {
    std::fill(z, z + s.length, -kInfinity);
    for (int64_t g = 0; g < group; ++g)
        kernels().standardise(scores + g * s.capacity + s.front, s.back - s.front, z + s.front);
}

void Select::compute(Context& context) const {
    Tensor const scores = context.input(0, "scores", {-1, -1, -1, -1});
    int64_t const layers = scores.shape[0], batches = scores.shape[1], capacity = scores.shape[3];
    Tensor const length = context.input(1, "length", {batches}), limit = context.input(2, "limit", {batches});
    Tensor const budget = context.input(3, "budget", {batches}), pinned = context.input(4, "pinned", {batches});
    int64_t const planLayers = scope_ == Scope::kPerLayerPerHead ? layers : 1;
    int64_t const planHeads = scope_ == Scope::kUnion ? 1 : heads_;
    Tensor const utility = context.optional(5, "utility", {layers * batches, heads_, capacity, 1});
    Tensor const plan = context.output(0, {planLayers, batches, planHeads, capacity});
    Tensor const keep = context.output(1, {batches}), evicted = context.output(2, {batches});
    if (scores.shape[2] % heads_) throw std::runtime_error("scores are " + text(scores.shape));
    int64_t const group = scores.shape[2] / heads_;

    for (int64_t b = 0; b < batches; ++b) {
        int32_t const held = length.as<int32_t>()[b];
        if (held > capacity) throw std::runtime_error("a sequence holds more rows than the capacity");
        bool const due = held >= limit.as<int32_t>()[b];
        int32_t const kept = std::max(0, std::min(budget.as<int32_t>()[b], held));
        keep.as<int32_t>()[b] = due ? kept : -1;
        evicted.as<int32_t>()[b] = due ? held - kept : 0;
        if (!due) continue;
        int64_t const front = std::min<int64_t>(held, std::max(pinned.as<int32_t>()[b], sinks_));
        Sequence const sequence = {held, kept, capacity, front, std::max<int64_t>(front, held - recent_)};
        auto z = [&](int64_t l, int64_t h, float* to) {
            int64_t const head = (l * batches + b) * heads_ + h;
            standardise(sequence, scores.as<float>() + head * group * capacity, group, to);
            if (!utility) return;
            float const* more = utility.as<float>() + head * capacity;
            for (int64_t row = sequence.front; row < sequence.back; ++row) {
                to[row] += more[row];
                if (!std::isfinite(to[row])) to[row] = -kInfinity;
            }
        };
        auto write = [&](int64_t l, int64_t h, float* ranked) {
            std::fill(ranked, ranked + sequence.front, kInfinity);
            std::fill(ranked + sequence.back, ranked + held, kInfinity);
            int32_t* to = plan.as<int32_t>() + ((l * batches + b) * planHeads + h) * capacity;
            std::fill(to + kept, to + capacity, 0);
            best(ranked, held, kept, to);
        };
        size_t const rows = static_cast<size_t>(held);
        if (scope_ == Scope::kPerLayerPerHead) {
            context.parallel(static_cast<size_t>(layers * heads_), [&](size_t index) {
                float* ranked = scratch(4, rows);
                int64_t const l = static_cast<int64_t>(index) / heads_, h = static_cast<int64_t>(index) % heads_;
                z(l, h, ranked);
                write(l, h, ranked);
            });
            continue;
        }
        bool const mean = scope_ == Scope::kPerHead;
        context.parallel(static_cast<size_t>(planHeads), [&](size_t index) {
            float *ranked = scratch(4, rows), *one = scratch(5, rows);
            std::fill(ranked, ranked + rows, mean ? 0.0f : -kInfinity);
            int64_t const first = static_cast<int64_t>(index), last = mean ? first + 1 : heads_;
            for (int64_t l = 0; l < layers; ++l)
                for (int64_t h = first; h < last; ++h) {
                    z(l, h, one);
                    for (size_t row = 0; row < rows; ++row)
                        ranked[row] = mean ? ranked[row] + one[row] : std::max(ranked[row], one[row]);
                }
            if (mean)
                for (size_t row = 0; row < rows; ++row) ranked[row] /= static_cast<float>(layers);
            write(0, first, ranked);
        });
    }
}

} // namespace keysieve
