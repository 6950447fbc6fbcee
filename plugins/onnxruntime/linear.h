// KeySieveLinear: x [...,K] times weights [N,K] of 4 or 8 bits -> [...,N], on MatMulNBits' numbers where the file has them.
//
// What stands around a product comes with it. In front: norm [K], which is an RMS norm's weight, or a gate. Behind:
// residual [...,N], which is added.
//
// weight uint8 [N, K/32, 4 * bits] or a reshape of it that keeps N, scale float [N, K/32], zero uint8
// [N, (K/32 * bits + 7) / 8], with K/32 rounded up. Activations are rounded to 8 bits, 32 sharing a scale. Nothing is packed
// anew, so weights stay mapped, and an embedding may share them.
#pragma once

#include "op.h"

namespace keysieve {

// gated: x [...,2K] is two halves, and silu(first) * second is what the weights are multiplied with.
class Linear {
public:
    explicit Linear(Attributes const& attributes)
        : rows_(attributes.integer("N")), depth_(attributes.integer("K")), bits_(attributes.integer("bits")),
          gated_(attributes.integer("gated")), epsilon_(attributes.real("epsilon")) {
        if (rows_ < 1 || depth_ < 1 || (bits_ != 4 && bits_ != 8))
            throw std::runtime_error("N and K must be above 0, and bits 4 or 8");
    }
    void compute(Context& context) const;

private:
    int64_t rows_, depth_, bits_, gated_;
    float epsilon_; // of the norm
};

} // namespace keysieve
