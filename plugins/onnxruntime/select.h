// KeySieveSelect: which rows stay; nothing unless a sequence is due. See keysieve.plugins.contract.
#pragma once

#include "op.h"

namespace keysieve {

class Select {
public:
    explicit Select(Attributes const& attributes);
    void compute(Context& context) const;

private:
    enum class Scope { kPerLayerPerHead, kPerHead, kUnion };
    struct Sequence;

    // The best z-score of a KV head's queries: z [rows], -infinity for rows that are no candidates.
    void standardise(Sequence const& sequence, float const* scores, int64_t group, float* z) const;

    Scope scope_;
    int64_t heads_;
    int32_t sinks_, recent_;
};

} // namespace keysieve
