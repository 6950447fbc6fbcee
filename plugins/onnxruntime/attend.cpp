#include "attend.h"

#include <cmath>
#include <limits>

namespace keysieve {

namespace {

// Queries of one KV head that a thread works on at a time; rows of a part, where one token's queries are split.
// Neither depends on the number of threads, so results do not.
constexpr int64_t kQueries = 192, kPart = 1024;

struct Task {
    int64_t sequence, head, first, count; // queries
    int64_t begin, end; // rows
};

// Tasks of a decoding step: every KV head's rows in parts.
void split(AttendShape const& shape, Plan const& plan, int64_t window, std::vector<Task>& tasks) {
    int64_t const group = shape.queryHeads / shape.heads;
    for (int64_t b = 0; b < shape.batches; ++b) {
        int64_t const end = plan.start(b) + 1, begin = window ? std::max<int64_t>(0, end - window) : 0;
        for (int64_t h = 0; h < shape.heads; ++h)
            for (int64_t row = begin; row < end; row += kPart)
                tasks.push_back({b, h, 0, group, row, std::min(row + kPart, end)});
    }
}

// Tasks of a longer step: every KV head's queries [S,G] in blocks.
void block(AttendShape const& shape, std::vector<Task>& tasks) {
    int64_t const count = shape.queryHeads / shape.heads * shape.tokens;
    for (int64_t b = 0; b < shape.batches; ++b)
        for (int64_t h = 0; h < shape.heads; ++h)
            for (int64_t q = 0; q < count; q += kQueries)
                tasks.push_back({b, h, q, std::min(kQueries, count - q), 0, 0});
}

} // namespace

std::vector<int64_t> numbers(std::string const& text) {
    std::vector<int64_t> found;
    for (size_t at = 0; at < text.size();) {
        size_t const end = std::min(text.find(',', at), text.size());
        found.push_back(std::stoll(text.substr(at, end - at)));
        at = end + 1;
    }
    return found;
}

NewRows newRows(Context const& context, Shape const& key, int64_t valueDim) {
    int64_t const heads = key[2], dim = key[3];
    Tensor const keyNew = context.optional(1, "key_new", key);
    bool const packed = !keyNew;
    Tensor const query = context.input(0, "query", packed ? Shape{key[0], -1, -1} : Shape{key[0], -1, -1, dim});
    int64_t const tokens = query.shape[1], width = packed ? query.shape[2] : query.shape[2] * dim;
    int64_t const queries = packed ? width - heads * (dim + valueDim) : width;
    if (queries <= 0 || queries % (heads * dim)) throw std::runtime_error("the heads of query and key do not fit");
    NewRows rows = {query.as<float>(), nullptr, nullptr, width, width, width, tokens, queries / dim};
    if (packed) {
        rows.key = rows.query + queries;
        rows.value = rows.key + heads * dim;
    } else {
        if (keyNew.shape[1] != tokens) throw std::runtime_error("key_new has another number of tokens than query");
        rows.key = keyNew.as<float>(), rows.keyStride = heads * dim;
        rows.value = context.input(2, "value_new", {key[0], tokens, heads, valueDim}).as<float>();
        rows.valueStride = heads * valueDim;
    }
    return rows;
}

void attend(Context const& context, CacheType type, AttendShape const& shape, Plan const& plan, float const* queries,
            char const* keys, char const* values, float const* sinks, int64_t window, float softcap, float* read) {
    Kernels const& k = kernels();
    int64_t const group = shape.queryHeads / shape.heads, count = group * shape.tokens;
    bool const few = shape.tokens == 1 && shape.keyDim % 16 == 0 && shape.valueDim % 16 == 0;
    thread_local std::vector<Task> tasks;
    tasks.clear();
    if (few) split(shape, plan, window, tasks);
    else block(shape, tasks);

    // A task's results lie behind each other: read [count, Dv], top and sum [count].
    int64_t const most = few ? group : std::min(kQueries, count), stride = most * (shape.valueDim + 2);
    float* partials = scratch(2, tasks.size() * static_cast<size_t>(stride));
    auto partial = [&](size_t index) {
        float* at = partials + index * static_cast<size_t>(stride);
        return Partial{at, at + most * shape.valueDim, at + most * (shape.valueDim + 1)};
    };
    Task const* all = tasks.data(); // tasks itself is each thread's own
    context.parallel(tasks.size(), [&, all](size_t index) {
        Task const& task = all[index];
        int64_t const number = task.sequence * shape.heads + task.head;
        size_t const rows = static_cast<size_t>(number * shape.capacity), item = itemSize(type);
        Head const head = {keys + rows * static_cast<size_t>(shape.keyDim) * item,
                           values + rows * static_cast<size_t>(shape.valueDim) * item, shape.keyDim, shape.valueDim};
        thread_local std::vector<int64_t> first, end;
        first.resize(static_cast<size_t>(task.count));
        end.resize(static_cast<size_t>(task.count));
        for (int64_t q = 0; q < task.count; ++q) {
            auto const at = static_cast<size_t>(q);
            end[at] = few ? task.end : plan.start(task.sequence) + (task.first + q) / group + 1;
            first[at] = few ? task.begin : window ? std::max<int64_t>(0, end[at] - window) : 0;
        }
        float const* data = queries + (number * count + task.first) * shape.keyDim;
        Queries const some = {data, task.count, first.data(), end.data(), softcap};
        int64_t const work = few ? k.fewWork(4, task.end - task.begin)
                                 : k.manyWork(task.count, shape.keyDim, shape.valueDim);
        auto const run = few ? k.attendFew[type] : k.attendMany[type];
        run(head, some, partial(index), scratch(3, static_cast<size_t>(work)));
    });

    // The parts of one KV head follow each other; each sink is one more logit, whose value is zero.
    for (size_t index = 0; index < tasks.size();) {
        Task const& task = tasks[index];
        size_t next = index + 1;
        while (few && next < tasks.size() && tasks[next].sequence == task.sequence && tasks[next].head == task.head) ++next;
        for (int64_t q = 0; q < task.count; ++q) {
            int64_t const token = (task.first + q) / group, h = task.head * group + (task.first + q) % group;
            float* out = read + ((task.sequence * shape.tokens + token) * shape.queryHeads + h) * shape.valueDim;
            float top = sinks ? sinks[h] : -std::numeric_limits<float>::infinity();
            for (size_t part = index; part < next; ++part) top = std::max(top, partial(part).top[q]);
            float sum = sinks ? std::exp(sinks[h] - top) : 0;
            std::fill(out, out + shape.valueDim, 0.0f);
            for (size_t part = index; part < next; ++part) {
                Partial const from = partial(part);
                float const share = std::exp(from.top[q] - top);
                sum += share * from.sum[q];
                for (int64_t d = 0; d < shape.valueDim; ++d) out[d] += share * from.read[q * shape.valueDim + d];
            }
            for (int64_t d = 0; d < shape.valueDim; ++d) out[d] /= sum;
        }
        index = next;
    }
}

} // namespace keysieve
